"""Run by test_gpu.py under TRITON_INTERPRET=1: the Triton form against torch's, bit for bit."""

import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packcases import DTYPES, cases, cuts, every_fp8_value, pools, random_offsets, shape, slots_of
from torch.utils._python_dispatch import TorchDispatchMode

from pdtrim_deploy.gpucheck import kernel_bits
from pdtrim_deploy.kvcache import torch_pack
from pdtrim_deploy.kvcache.checksum import torch_checksum
from pdtrim_deploy.kvcache.gpu import move as gpu
from pdtrim_deploy.kvcache.gpu.library import library
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pool_rows import FP8
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.wire import FP8_ROWS, LATENT_SIDES, SMALLER_THAN_FP8, WIRE_DTYPES

UNTOUCHED = -9.0
CPU = torch.device("cpu")


def check(layout, source, from_slots, targets, to_slots, offsets, from_groups=None, to_groups=None):
    """Both forms pack the same bytes, and unpack them into equal pools."""
    buffers = [torch.full((layout.total_bytes,), 0xA5, dtype=torch.uint8) for _ in range(2)]
    torch_pack.pack(layout, *source, from_slots, buffers[0], offsets, from_groups)
    assert gpu.move(layout, buffers[1], *source, from_slots, offsets, from_groups, pack=True) == bool(layout.layers)
    assert torch.equal(*buffers), [
        rows.wire_dtype
        for rows in layout.layers
        if not torch.equal(*(buffer[rows.offset : rows.offset + rows.bytes] for buffer in buffers))
    ]
    torch_pack.unpack(layout, buffers[0], *targets[0], to_slots, offsets, to_groups)
    gpu.move(layout, buffers[0], *targets[1], to_slots, offsets, to_groups, pack=False)
    for expected, result in zip((t for s in targets[0] for t in s), (t for s in targets[1] for t in s), strict=True):
        torch.testing.assert_close(expected.float(), result.float(), rtol=0, atol=0, equal_nan=True)
        if expected.dtype in FP8 or all(rows.wire_dtype == "native" for rows in layout.layers):
            assert torch.equal(expected.contiguous().view(torch.uint8), result.contiguous().view(torch.uint8))
    gpu.check(CPU)


def empty(plan, like):
    return [[[torch.full_like(like, UNTOUCHED) for _ in plan.kv] for _ in range(2)] for _ in range(2)]


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), cases(), st.integers(1, 20), st.integers(0, 2**31))
def test_any_plan_cut_anywhere(data, case, tokens, seed):
    plan, offsets = case
    size = tokens + 7
    source = [pools(len(plan.prefill_layers), size, plan.model, seed + side) for side in range(2)]
    from_slots, to_slots = data.draw(slots_of(size, tokens)), data.draw(slots_of(size, tokens))
    targets = empty(plan, source[0][0])
    for start, stop in data.draw(cuts(tokens)):
        check(
            chunk_layout(plan, tokens, start, stop),
            source,
            from_slots[start:stop],
            targets,
            to_slots[start:stop],
            offsets,
        )


@pytest.mark.parametrize(
    ("dim", "dtype"),  # a kernel is made of each by itself: all dtypes of one size, all sizes of two dtypes
    [
        *((64, dtype) for dtype in DTYPES),
        *((dim, d) for dim in (16, 80, 96, 128, 256) for d in ("bfloat16", "fp8_e4m3")),
    ],
)
def test_all_wire_dtypes_in_one_chunk(dim, dtype):
    """Whole and cut layers in turn, every other one with a key offset; rows of more than one program."""
    pool = dtype if dtype in FP8_ROWS else "native"
    wires = [wire for wire in WIRE_DTYPES if KVSend(wire_dtype=wire).suits(dim, pool)]
    cut = {"mode": "sparse", "n_first": 4, "n_last": 9}
    sends = tuple(KVSend(wire_dtype=wire, **(cut if layer % 3 else {})) for layer, wire in enumerate(wires))
    model = shape(len(wires), 3, dim, dtype)
    offsets = random_offsets(model, range(0, len(wires), 2), scaling=1.2)
    plan = PDPlan.dense(model).with_kv(sends).with_key_offsets(offsets.file)
    source = [pools(len(wires), 99, model, side) for side in range(2)]
    slots = torch.randperm(99, generator=torch.Generator().manual_seed(0))[:90]
    for start, stop in ((0, 33), (33, 90)):
        check(
            chunk_layout(plan, 90, start, stop),
            source,
            slots[start:stop],
            empty(plan, source[0][0]),
            slots[start:stop],
            offsets,
        )


@pytest.mark.parametrize("wire", ["native", "fp8", "int8", "int4", "int3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_and_rope_keys_that_are_views_of_one_pool(wire, dtype):
    model = ModelShape(
        architecture="X", fingerprint="f", num_blocks=2, num_kv_heads=1, head_dim=128, rope_dim=24, kv_dtype=dtype
    )
    plan = PDPlan.dense(model).with_kv((KVSend(wire_dtype=wire),) * 2)
    rows = pools(2, 40, shape(1, 1, 152, dtype), 0)

    def views(pool_rows):
        flat = [row[:, 0] for row in pool_rows]
        return [[row[:, part].unflatten(1, (2, -1)) for row in flat] for part in (slice(128, None), slice(128))]

    targets = [views([torch.full_like(row, UNTOUCHED) for row in rows]) for _ in range(2)]
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:33]
    for start, stop in ((0, 7), (7, 33)):
        part = slots[start:stop]
        check(chunk_layout(plan, 33, start, stop), views(rows), part, targets, part, None)


@pytest.mark.parametrize("dtype", FP8_ROWS)
@pytest.mark.parametrize("wire", SMALLER_THAN_FP8)
def test_every_value_of_an_fp8_pool(wire, dtype):
    pool, plan, offsets = every_fp8_value(wire, dtype, 64)
    slots = torch.arange(len(pool))
    check(chunk_layout(plan, len(pool)), [[pool], [pool]], slots, empty(plan, pool), slots, None)
    plan = plan.with_key_offsets(offsets.file)
    check(chunk_layout(plan, len(pool)), [[pool], [pool]], slots, empty(plan, pool), slots, offsets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wire", sorted({*WIRE_DTYPES} - {"k4v3"}))
def test_every_16_bit_value(wire, dtype, monkeypatch):
    """In heads of neighbours, which are finite together, and each among others; in native rows NaN keep their bits."""
    monkeypatch.setattr(gpu, "TILE", 1 << 16)  # the interpreter takes its time for each program
    ordered = torch.arange(-(2**15), 2**15).to(torch.int16)
    shuffled = ordered[torch.randperm(len(ordered), generator=torch.Generator().manual_seed(0))]
    pool = torch.cat((ordered, shuffled)).view(dtype).view(-1, 4, 64)
    slots, model = torch.arange(len(pool)), shape(1, 4, 64, str(dtype).removeprefix("torch."))
    plan, offsets = PDPlan.dense(model).with_kv((KVSend(wire_dtype=wire),)), random_offsets(model, [0])
    check(chunk_layout(plan, len(pool)), [[pool], [pool]], slots, empty(plan, pool), slots, None)
    plan = plan.with_key_offsets(offsets.file)
    check(chunk_layout(plan, len(pool)), [[pool], [pool]], slots, empty(plan, pool), slots, offsets)


def test_more_runs_than_a_program_looks_at_together():
    model, cut = shape(72, 1, 4, "bfloat16"), KVSend(mode="sparse", n_first=1, n_last=1, wire_dtype="int8")
    plan = PDPlan.dense(model).with_kv((cut,) * 72)
    source, slots = [pools(72, 8, model, side) for side in range(2)], torch.tensor([3, 1, 7, 5])
    layout = chunk_layout(plan, 4)
    assert len(gpu.chunk_tables(layout, *source, pack=True)[0].runs) > 256
    check(layout, source, slots, empty(plan, source[0][0]), slots, None)


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("wire", WIRE_DTYPES)
def test_a_range_of_a_pools_heads(wire, first):
    """Those of one rank of a stage with more ranks: only they are read, and only they written."""
    model, part = shape(2, 5, 32, "bfloat16"), shape(2, 2, 32, "bfloat16")
    known = random_offsets(model, [0, 1])
    offsets = known.heads(range(first, first + 2))
    plan = PDPlan.dense(model).with_kv((KVSend(wire_dtype=wire),) * 2).with_key_offsets(known.file)
    layout, slots = chunk_layout(plan, 9, kv_heads=part.num_kv_heads), torch.randperm(12)[:9]
    whole = [pools(2, 12, model, side) for side in range(2)]
    into = empty(plan, whole[0][0])
    heads = slice(first, first + 2)
    views = [[pool[:, heads] for pool in side] for side in whole]
    check(layout, views, slots, [[[t[:, heads] for t in side] for side in form] for form in into], slots, offsets)
    others = torch.ones(5, dtype=torch.bool)
    others[heads] = False
    assert all((t[:, others] == UNTOUCHED).all() for form in into for side in form for t in side)
    assert not any((t[slots][:, heads] == UNTOUCHED).all(-1).any() for form in into for side in form for t in side)


def test_a_pool_that_is_not_aligned():
    model = shape(1, 3, 64, "bfloat16")
    plan = PDPlan.dense(model).with_kv((KVSend(wire_dtype="k4v3"),))
    flat, slots = torch.randn(2, 20 * 3 * 64 + 1).bfloat16(), torch.arange(3, 17)
    source = [[side[1:].view(20, 3, 64)] for side in flat]
    (table,) = gpu.chunk_tables(chunk_layout(plan, 14), *source, pack=True)
    assert gpu.constants(table, True)["ALIGN"] == 2  # else a GPU would read 16 bytes where it must not
    check(chunk_layout(plan, 14), source, slots, empty(plan, source[0][0]), slots, None)


@pytest.mark.parametrize("wire", WIRE_DTYPES)
@pytest.mark.parametrize("slot", [-1, 8, 2**40])
def test_a_slot_outside_its_pool_is_neither_read_nor_written(wire, slot):
    whole = torch.randn(24, 2, 32)
    pool, model = whole[8:16], shape(1, 2, 32)
    layout = chunk_layout(PDPlan.dense(model).with_kv((KVSend(wire_dtype=wire),)), 9, 3, 6)
    slots, zeros = torch.tensor([5, slot, 2]), torch.zeros(1, 2, 32)
    packed, expected = (torch.empty(layout.total_bytes, dtype=torch.uint8) for _ in range(2))
    gpu.move(layout, packed, [pool], [pool], slots, pack=True)
    with pytest.raises(IndexError, match="outside its pool"):
        gpu.check(CPU)
    gpu.check(CPU)  # told once
    with_zeros = torch.cat((pool, zeros))
    torch_pack.pack(layout, [with_zeros], [with_zeros], torch.tensor([5, 8, 2]), expected)
    assert torch.equal(packed, expected)
    before = whole.clone()
    gpu.move(layout, packed, [pool], [pool], slots, pack=False)
    with pytest.raises(IndexError):
        gpu.check(CPU)
    changed = (whole != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert set(changed) <= {8 + 5, 8 + 2}
    assert wire == "native" or changed


def test_a_slot_outside_its_pool_is_told_to_the_thread_that_queued_the_chunk_and_to_no_other():
    pool, layout = torch.randn(8, 2, 32), chunk_layout(PDPlan.dense(shape(1, 2, 32)), 3)
    packed, raised = torch.empty(layout.total_bytes, dtype=torch.uint8), []
    queued, looked = threading.Event(), threading.Event()

    def wrong():
        gpu.move(layout, packed, [pool], [pool], torch.tensor([5, 8, 2]), pack=True)
        queued.set()
        looked.wait(60)
        try:
            gpu.check(CPU)
        except IndexError as error:
            raised.append(str(error))

    thread = threading.Thread(target=wrong)
    thread.start()
    assert queued.wait(60)
    gpu.move(layout, packed.clone(), [pool], [pool], torch.tensor([5, 7, 2]), pack=True)
    gpu.check(CPU)
    looked.set()
    thread.join()
    assert raised == ["a slot of a prompt lay outside its pool; its rows were not moved"]


class Operations(TorchDispatchMode):
    """What torch itself would run on a device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func._schema.name not in ("aten::empty.memory_format", "aten::empty"):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_e4m3"])
def test_a_chunk_is_one_launch_and_nothing_else(monkeypatch, dtype, pack):
    model = shape(32, 8, 128, dtype)
    sends = tuple(
        KVSend(wire_dtype="k4v3", **({"mode": "sparse", "n_first": 4, "n_last": 64} if i % 4 else {}))
        for i in range(32)
    )
    offsets = random_offsets(model, range(32))
    plan = PDPlan.dense(model).with_kv(sends).with_key_offsets(offsets.file)
    layout, slots = chunk_layout(plan, 600, 0, 512), torch.arange(512)
    rows = getattr(torch, model.row_dtype)
    keys, values = ([torch.zeros(600, 8, 128).to(rows) for _ in range(32)] for _ in range(2))
    packed, launches = torch.empty(layout.total_bytes, dtype=torch.uint8), []
    offsets.table(600)  # of a prompt's positions; made once for a plan, as a device's fault is for the device
    gpu.check(CPU)
    monkeypatch.setattr(gpu, "launch", lambda kernel, *rest, **known: launches.append(kernel))
    monkeypatch.setattr(gpu, "to_device", lambda runs, device: launches.append("table") or runs)
    prompt, groups = torch.arange(600).expand(4, -1).contiguous(), tuple(layer % 4 for layer in range(32))
    for places, of_layers in ((slots, None), (prompt[:, 20:532], groups)):
        for copies in (["table"], []):  # a new chunk, and one whose table is there
            launches.clear()
            with Operations() as operations:
                assert gpu.move(layout, packed, keys, values, places, offsets, of_layers, pack=pack)
            assert launches == [*copies, gpu.pack_runs if pack else gpu.unpack_runs]
            assert operations.names == []


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), cases(), st.integers(1, 9), st.integers(0, 2**31))
def test_layers_with_slots_of_their_own(data, case, tokens, seed):
    """Three rows of slots, which lie a prompt apart: chunks are columns of them."""
    (plan, offsets), size = case, tokens + 7
    from_slots, to_slots = (torch.stack([data.draw(slots_of(size, tokens)) for _ in range(3)]) for _ in range(2))
    source = [pools(len(plan.prefill_layers), size, plan.model, seed + side) for side in range(2)]
    from_groups, to_groups = (
        tuple(data.draw(st.integers(0, 2)) for _ in layers) for layers in (plan.prefill_layers, plan.kv)
    )
    targets = empty(plan, source[0][0])
    for start, stop in data.draw(cuts(tokens)):
        layout, part = chunk_layout(plan, tokens, start, stop), slice(start, stop)
        check(layout, source, from_slots[:, part], targets, to_slots[:, part], offsets, from_groups, to_groups)


def test_the_interpreter_counts_as_a_form():
    assert library() is gpu


@pytest.mark.parametrize(
    ("wire", "dtype"), [("native", "bfloat16"), ("fp8", "bfloat16"), ("k4v3", "bfloat16"), ("k4v3", "fp8_e4m3")]
)
def test_the_check_of_bits_on_a_gpu(wire, dtype, monkeypatch):
    for sizes in ("HEAD_DIMS", "USUAL_HEAD_DIMS"):
        monkeypatch.setattr(kernel_bits, sizes, (96,))
    figure = kernel_bits.bits(CPU, wire, dtype, tokens=90)
    assert figure["bytes_compared"] > 3 * 90 * 96
    whole = gpu.move

    def broken(layout, packed, keys, values, *rest, pack):
        whole(layout, packed, keys, values, *rest, pack=pack)
        (packed if pack else values[1].view(torch.uint8).view(-1))[-1:] ^= 1
        return True

    for direction in (True, False):
        monkeypatch.setattr(gpu, "move", lambda *a, pack, d=direction: (broken if pack == d else whole)(*a, pack=pack))
        with pytest.raises(AssertionError, match=r"head size 96, tokens 0 to 30: [01] of \d+ packed bytes and [01]"):
            kernel_bits.bits(CPU, wire, dtype, tokens=90)


def test_the_check_on_gpus_of_the_checksum_passes_here_and_sees_a_bit(monkeypatch):
    assert kernel_bits.checksums(CPU, (1, 4095, 70_001))["sizes"] == 3
    monkeypatch.setattr(kernel_bits, "torch_checksum", lambda data: torch_checksum(data) ^ 1)
    with pytest.raises(AssertionError, match=r"of 4095 bytes the kernel computes -?0x"):
        kernel_bits.checksums(CPU, (4095,))


@pytest.mark.parametrize("wire", LATENT_SIDES)
def test_the_check_on_gpus_of_latents_passes_here(wire):
    figure = kernel_bits.latent_bits(CPU, wire, tokens=40)
    assert figure["bytes_compared"] > 40 * 3 * 200


def test_the_check_on_gpus_of_latents_sees_a_byte(monkeypatch):
    def spoilt(*arguments, **options):
        result = torch_pack.pack(*arguments, **options)
        result[-1] ^= 1
        return result

    monkeypatch.setattr(kernel_bits, "torch_pack", SimpleNamespace(pack=spoilt, unpack=torch_pack.unpack))
    with pytest.raises(AssertionError, match=r"1 of \d+ packed bytes"):
        kernel_bits.latent_bits(CPU, "int8", tokens=40)
