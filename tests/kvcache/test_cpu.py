"""The compiled form against torch's, bit for bit; what it refuses; and what happens where it cannot be compiled."""

import ctypes
import logging
import platform
import shutil
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packcases import cases, cuts, every_fp8_value, pools, random_offsets, shape, slots_of

from pdtrim_deploy.kvcache import torch_pack
from pdtrim_deploy.kvcache.cpu import library as cpu_library
from pdtrim_deploy.kvcache.cpu.move import move
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack, unpack
from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.plan.wire import FP8_ROWS, SMALLER_THAN_FP8, WIRE_DTYPES

UNTOUCHED = -9.0
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not on PATH: there is no compiled form")


def spoil(pool, generator):
    """In place: what no cache should hold, and all orders of magnitude, by row and head."""
    limit = torch.finfo(pool.dtype).max
    exponent = torch.randint(-150, 128, (*pool.shape[:2], 1), generator=generator).double()
    pool.copy_((pool.float().double() * torch.exp2(exponent)).clamp(-limit, limit))
    for odd in (
        torch.nan,
        torch.inf,
        -torch.inf,
        limit,
        -limit,
        torch.finfo(pool.dtype).smallest_normal / 2,
        0.0,
        -0.0,
    ):
        row, head, channel = (int(torch.randint(size, (), generator=generator)) for size in pool.shape)
        pool[row, head, channel] = odd
    pool[int(torch.randint(len(pool), (), generator=generator))] = 0


def equal(first, second):
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


@needs_compiler
@settings(max_examples=200, deadline=None)
@given(st.data(), cases(), st.integers(1, 20), st.booleans(), st.integers(0, 2**31))
def test_both_forms_have_the_same_bytes(data, case, tokens, odd, seed):
    plan, offsets = case
    size, generator = tokens + 7, torch.Generator().manual_seed(seed)
    source = [pools(len(plan.prefill_layers), size, plan.model, seed + side) for side in range(2)]
    for pool in (*source[0], *source[1]) if odd else ():
        spoil(pool, generator)
    from_slots, to_slots = data.draw(slots_of(size, tokens)), data.draw(slots_of(size, tokens))
    targets = [[[torch.full_like(source[0][0], UNTOUCHED) for _ in plan.kv] for _ in range(2)] for _ in range(2)]
    for start, stop in data.draw(cuts(tokens)):
        layout = chunk_layout(plan, tokens, start, stop)
        buffers = [torch.full((layout.total_bytes + 8,), 0xA5, dtype=torch.uint8)[4:-4] for _ in range(2)]
        torch_pack.pack(layout, *source, from_slots[start:stop], buffers[0], offsets)
        assert move(layout, buffers[1], *source, from_slots[start:stop], offsets, pack=True) == bool(layout.layers)
        assert equal(*buffers)
        torch_pack.unpack(layout, buffers[0], *targets[0], to_slots[start:stop], offsets)
        move(layout, buffers[1], *targets[1], to_slots[start:stop], offsets, pack=False)
    for expected, result in zip((t for s in targets[0] for t in s), (t for s in targets[1] for t in s), strict=True):
        torch.testing.assert_close(expected.float(), result.float(), rtol=0, atol=0, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("dtype", FP8_ROWS)
@pytest.mark.parametrize("wire", SMALLER_THAN_FP8)
@pytest.mark.parametrize("dim", [64, 128, 32])
def test_every_value_of_an_fp8_pool(wire, dtype, dim):
    """NaN and infinities too; with key offsets, and dequantised rows on both sides of every edge between codes."""
    pool, plan, known = every_fp8_value(wire, dtype, dim)
    slots = torch.arange(len(pool))
    for case, offsets in ((plan, None), (plan.with_key_offsets(known.file), known)):
        layout = chunk_layout(case, len(slots))
        packed = torch.zeros(layout.total_bytes, dtype=torch.uint8)
        assert move(layout, packed, [pool], [pool], slots, offsets, pack=True)
        assert equal(packed, torch_pack.pack(layout, [pool], [pool], slots, offsets=offsets))
        results, expected_rows = ([torch.zeros_like(pool) for _ in range(2)] for _ in range(2))
        assert move(layout, packed, [results[0]], [results[1]], slots, offsets, pack=False)
        torch_pack.unpack(layout, packed, [expected_rows[0]], [expected_rows[1]], slots, offsets)
        assert all(map(equal, results, expected_rows))
        if wire == "native":
            assert equal(results[0], pool)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wire", WIRE_DTYPES)
@pytest.mark.parametrize("dim", [64, 128, 32])
def test_every_16_bit_value(wire, dtype, dim):
    check_every_16_bit_value(wire, dtype, dim)


def check_every_16_bit_value(wire, dtype, dim):
    """In heads of neighbours, and each among others drawn at random; the ones that are not finite too."""
    ordered = torch.arange(-(2**15), 2**15).to(torch.int16)
    shuffled = ordered[torch.randperm(len(ordered), generator=torch.Generator().manual_seed(0))]
    pool = torch.cat((ordered, shuffled)).view(dtype).view(-1, 4, dim)
    slots = torch.arange(len(pool))
    whole = PDPlan.dense(shape(1, 4, dim, str(dtype).removeprefix("torch."))).with_kv((KVSend(wire_dtype=wire),))
    known = random_offsets(whole.model, [0])
    for plan, offsets in ((whole, None), (whole.with_key_offsets(known.file), known)):
        layout = chunk_layout(plan, len(slots))
        packed = pack(layout, [pool], [pool], slots, offsets=offsets)
        assert equal(packed, torch_pack.pack(layout, [pool], [pool], slots, offsets=offsets))
        result, expected = ([torch.zeros_like(pool) for _ in range(2)] for _ in range(2))
        unpack(layout, packed, [result[0]], [result[1]], slots, offsets)
        torch_pack.unpack(layout, packed, [expected[0]], [expected[1]], slots, offsets)
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("wire", WIRE_DTYPES)
def test_large_batches_in_threads(wire):
    """Past the sizes at which threads start and writes stream past the cache."""
    plan = PDPlan.dense(shape(3, 8, 128, "bfloat16")).with_kv((KVSend(wire_dtype=wire),) * 3)
    generator = torch.Generator().manual_seed(0)
    pool = [torch.randn(1024, 8, 128, generator=generator).bfloat16() for _ in range(3)]
    slots, layout = torch.randperm(1024, generator=generator)[:1000], chunk_layout(plan, 1000)
    expected, before = torch_pack.pack(layout, pool, pool, slots), torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            packed = pack(layout, pool, pool, slots)
            assert equal(packed, expected)
            target = [torch.zeros_like(sent) for sent in pool]
            unpack(layout, packed, target, target, slots)
            for received, sent in zip(target, pool, strict=True):
                torch.testing.assert_close(
                    received[slots], sent[slots], rtol=0, atol={"int4": 1.0, "k4v3": 2.0, "int3": 2.0}.get(wire, 0.2)
                )
                assert not received[torch.tensor(sorted(set(range(1024)) - set(slots.tolist())))].any()
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="for processors that have less than this one")
def test_a_processor_without_wide_vectors(monkeypatch, tmp_path):
    swapped = {"-march=native": "-march=x86-64", "-O3": "-O0"}  # -O0: its compiler is quicker, its bytes are the same
    options = tuple(swapped.get(option, option) for option in cpu_library.OPTIONS)
    monkeypatch.setattr(cpu_library, "OPTIONS", options)
    cpu_library.compile_into(tmp_path)
    plain = ctypes.CDLL(str(tmp_path / cpu_library.NAME))
    monkeypatch.setattr("pdtrim_deploy.kvcache.cpu.move.library", lambda: plain)
    for wire in WIRE_DTYPES:
        for dtype, dim in ((torch.bfloat16, 64), (torch.float16, 32), (torch.bfloat16, 128)):
            check_every_16_bit_value(wire, dtype, dim)


@needs_compiler
def test_pools_that_are_slices_and_odd_strides():
    plan = PDPlan.dense(shape(1, 2, 64)).with_kv((KVSend(wire_dtype="int8"),))
    whole, layout, slots = torch.randn(9, 5, 64), chunk_layout(plan, 4), torch.tensor([8, 0, 3, 2])
    for pool in (whole[:, 1:3], whole[:, ::2][:, :2], torch.randn(9, 64, 2).transpose(1, 2)):
        assert equal(pack(layout, [pool], [pool], slots), torch_pack.pack(layout, [pool], [pool], slots))


@needs_compiler
@pytest.mark.parametrize("slot", [-1, 8, 2**40])
def test_a_slot_outside_the_pool_is_refused_and_nothing_written(slot):
    plan, pool = PDPlan.dense(shape(1, 2, 64)), [torch.zeros(8, 2, 64)]
    layout, packed = chunk_layout(plan, 2), torch.ones(4 * 2 * 2 * 2 * 64, dtype=torch.uint8)
    with pytest.raises(IndexError, match="a slot of the prompt lies outside the pool of 8 slots"):
        unpack(layout, packed, pool, pool, torch.tensor([1, slot]))
    assert not pool[0].any()
    with pytest.raises(IndexError):
        pack(layout, pool, pool, torch.tensor([1, slot]))


@needs_compiler
def test_the_gil_is_free_meanwhile():
    plan = PDPlan.dense(shape(1, 8, 128)).with_kv((KVSend(wire_dtype="int4"),))
    pool, slots, layout = [torch.randn(60_000, 8, 128)], torch.arange(60_000), chunk_layout(plan, 60_000)
    turns, tries = 0, 0
    while turns <= 20 and tries < 10:  # on a busy machine this thread may not run while the other one does
        turns, tries, done = 0, tries + 1, threading.Event()
        packing = threading.Thread(target=lambda done=done: (pack(layout, pool, pool, slots), done.set()))
        packing.start()
        while not done.is_set():
            turns += 1
            time.sleep(1e-4)
        packing.join()
    assert turns > 20


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not loaded the library yet, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_library.library.cache_clear()
    yield tmp_path
    cpu_library.library.cache_clear()


def test_without_a_compiler_torch_packs_and_one_line_says_so(fresh, monkeypatch, caplog):
    monkeypatch.setattr(cpu_library.shutil, "which", lambda _: None)
    plan, pool = PDPlan.dense(shape(1, 2, 64)), [torch.randn(8, 2, 64)]
    layout, slots = chunk_layout(plan, 3), torch.tensor([5, 0, 7])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            packed = pack(layout, pool, pool, slots)
    assert equal(packed.view(torch.float32).view(2, 3, 2, 64), torch.stack([pool[0][slots]] * 2))
    assert [record.message for record in caplog.records] == [
        "pdtrim: KV is packed by torch's own operations, the same bytes but far slower: "
        "g++ is not on PATH; install it (Debian: apt-get install g++) and start again"
    ]


@pytest.mark.parametrize(
    ("cpuinfo", "another"),
    [
        ("model name\t: A\nflags\t: avx2 avx512f\n", "model name\t: A\nflags\t: avx2\n"),
        ("Features\t: asimd sve\nCPU part\t: 0xd40\n", "Features\t: asimd\nCPU part\t: 0xd40\n"),
        ("Features\t: asimd\nCPU part\t: 0xd40\n", "Features\t: asimd\nCPU part\t: 0xd0c\n"),
    ],
)
def test_processors_that_differ_share_no_library(cpuinfo, another, monkeypatch, tmp_path):
    keys = []
    for text in (cpuinfo, another, cpuinfo):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(cpu_library, "CPUINFO", tmp_path / "cpuinfo")
        keys.append(cpu_library._key())
    assert keys[0] == keys[2] != keys[1]


def test_a_change_of_a_header_makes_another_library(monkeypatch, tmp_path):
    for name, text in (("rows.cpp", '#include "row.h"'), ("row.h", "")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cpu_library, "SOURCE", tmp_path / "rows.cpp")
    before = cpu_library._key()
    (tmp_path / "row.h").write_text("int more;")
    assert cpu_library._key() != before


@needs_compiler
def test_what_the_compiler_says_is_passed_on(fresh, monkeypatch, caplog, tmp_path):
    broken = tmp_path / "rows.cpp"
    broken.write_text("int main( {")
    monkeypatch.setattr(cpu_library, "SOURCE", broken)
    with caplog.at_level(logging.WARNING):
        assert cpu_library.library() is None
    assert "refused rows.cpp" in caplog.text
