"""The CUDA kernel's source, compiled for the host, against kvcache.pack; by nvcc where there is one."""

import shutil
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pdtrim_tensorrt.compile_kernels import ARCHITECTURES, SOURCE, compile_for_gpus, compile_for_host, parse_ptxas
from pdtrim_tensorrt.kernel import KERNEL_WIRE_DTYPES, SendKernel

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack
from pdtrim_deploy.plan import Drop, Keep, KVSend, ModelShape, PDPlan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNWRITTEN = 0xA5
needs_nvcc = pytest.mark.skipif(
    not shutil.which("nvcc"), reason="nvcc is not on PATH: the kernel cannot be compiled for GPUs"
)


@pytest.fixture(scope="session")
def send(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("g++ is not on PATH: the kernel cannot be compiled for the host")
    return SendKernel(compile_for_host(tmp_path_factory.mktemp("kernel")))


def staging_of(size):
    return torch.full((size,), UNWRITTEN, dtype=torch.uint8)


def packed_by_python(keys, values, rows, wire):
    """What kvcache.pack makes of these rows of one layer."""
    _, heads, dim = keys.shape
    model = ModelShape(
        architecture="X",
        fingerprint="f",
        num_blocks=1,
        num_kv_heads=heads,
        head_dim=dim,
        kv_dtype=str(keys.dtype).removeprefix("torch."),
    )
    plan = PDPlan(model=model, prefill=(Keep(),), decode=(Keep(),), kv=(KVSend(wire_dtype=wire),))
    return pack(chunk_layout(plan, len(rows)), [keys], [values], rows)


@st.composite
def plans(draw):
    blocks = draw(st.integers(1, 4))
    decode = [draw(st.booleans()) for _ in range(blocks)]
    decode[draw(st.integers(0, blocks - 1))] = True
    prefill = [full or draw(st.booleans()) for full in decode]
    sends = []
    for _ in range(sum(decode)):
        first, last = draw(st.integers(0, 5)), draw(st.integers(0, 20))
        cut = {"mode": "sparse", "n_first": first, "n_last": last} if first + last else {}
        sends.append(KVSend(wire_dtype=draw(st.sampled_from(KERNEL_WIRE_DTYPES)), **cut))
    model = ModelShape(
        architecture="X",
        fingerprint="f",
        num_blocks=blocks,
        num_kv_heads=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([2, 6, 8, 16, 24, 64, 80])),
        kv_dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
    )
    action = {True: Keep(), False: Drop()}
    stages = {"prefill": tuple(action[k] for k in prefill), "decode": tuple(action[k] for k in decode)}
    return PDPlan(model=model, kv=tuple(sends), **stages)


@settings(max_examples=80, deadline=None)
@given(st.data(), plans(), st.integers(1, 30), st.booleans(), st.sampled_from([torch.int64, torch.int32]))
def test_it_is_bit_equal_to_pack_on_random_plans(send, data, plan, tokens, reference, index):
    shape = (tokens + 5, plan.model.num_kv_heads, plan.model.head_dim)
    dtype = getattr(torch, plan.model.kv_dtype)
    pools = [[torch.randn(shape).to(dtype) for _ in plan.prefill_layers] for _ in range(2)]
    slots = torch.tensor(data.draw(st.permutations(range(tokens + 5))))[:tokens]
    start = data.draw(st.integers(0, tokens))
    layout = chunk_layout(plan, tokens, start, data.draw(st.integers(start, tokens)))
    shift = data.draw(st.sampled_from([0, 4, 16]))  # a staging buffer that is not 16-byte aligned too
    staging = staging_of(shift + layout.total_bytes + 8)
    for layer in layout.layers:
        rows = torch.cat([slots[start + lo : start + hi] for lo, hi in layer.ranges]).to(index)
        keys, values = (side[layer.prefill_layer] for side in pools)
        written = send(keys, values, rows, staging, shift + layer.offset, layer.wire_dtype, reference=reference)
        assert written == layer.bytes
    packed = pack(layout, *pools, slots[start : layout.stop])
    assert torch.equal(staging[shift : shift + layout.total_bytes], packed)
    assert (staging[:shift] == UNWRITTEN).all()
    assert (staging[shift + layout.total_bytes :] == UNWRITTEN).all()


@settings(max_examples=120, deadline=None)
@given(
    st.data(),
    st.sampled_from(["int8", "fp8"]),
    st.sampled_from(DTYPES),
    st.integers(1, 11),
    st.sampled_from([2, 6, 16, 24, 34, 64, 80, 128]),
    st.booleans(),
)
def test_quantised_is_bit_equal_to_the_codecs(send, data, wire, dtype, heads, dim, reference):
    seed, exponent = data.draw(st.integers(0, 2**31)), data.draw(st.integers(-30, 14))
    random = torch.Generator().manual_seed(seed)
    pools = (torch.randn(12, heads, dim, generator=random).mul(2.0**exponent) for _ in range(2))
    keys, values = (pool.clamp(-65504, 65504).to(dtype) for pool in pools)  # codes of a head not finite are undefined
    keys[3, 0], values[5, heads - 1, 0] = 0.0, 2.0**15  # a head of zeros; one that dwarfs its neighbours
    rows = torch.tensor([*data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=12)), 3, 5])
    offset = data.draw(st.sampled_from([0, 2, 4, 16]))
    expected = packed_by_python(keys, values, rows, wire)
    staging = staging_of(offset + len(expected) + 8)
    written = send(keys, values, rows, staging, offset, wire, reference=reference)
    assert written == len(expected)
    assert torch.equal(staging[offset : offset + written], expected)
    assert (staging[:offset] == UNWRITTEN).all()
    assert (staging[offset + written :] == UNWRITTEN).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wire", KERNEL_WIRE_DTYPES)
def test_pools_that_are_not_16_byte_aligned(send, wire, dtype):
    flat = torch.randn(1 + 9 * 3 * 32).to(dtype)
    pool = flat[1:].view(9, 3, 32)
    rows = torch.tensor([8, 0, 4])
    expected = packed_by_python(pool, pool, rows, wire)
    staging = staging_of(len(expected))
    assert send(pool, pool, rows, staging, 0, wire) == len(expected)
    assert torch.equal(staging, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wire", ["int8", "fp8"])
def test_every_finite_16_bit_value(send, wire, dtype):
    """In heads of 64 neighbours, so that scales from the smallest to the largest occur."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    pool = torch.where(bits.isfinite(), bits, torch.zeros((), dtype=dtype)).view(-1, 4, 64)
    rows = torch.arange(len(pool))
    expected = packed_by_python(pool, pool, rows, wire)
    for reference in (False, True):
        staging = staging_of(len(expected))
        send(pool, pool, rows, staging, 0, wire, reference=reference)
        assert torch.equal(staging, expected)


@pytest.mark.parametrize(("wire", "bound"), [("int8", 0.51 / 127), ("fp8", 1 / 27)])
def test_the_receiver_gets_back_what_was_sent(send, wire, bound):
    """Within half a step of int8, and half of e4m3's last bit (1/16 of the value), of the head's largest value."""
    pool = torch.randn(40, 3, 64)
    staging = staging_of(2 * 40 * 3 * (64 + 2))
    send(pool, pool, torch.arange(40), staging, 0, wire)
    side = staging[: len(staging) // 2]
    codes, scales = side[: pool.numel()], side[pool.numel() :].view(torch.float16).view(40, 3, 1)
    codes = codes.view(torch.int8 if wire == "int8" else torch.float8_e4m3fn).view(pool.shape)
    error = (codes.float() * scales.float() - pool).abs() / pool.abs().amax(-1, keepdim=True)
    assert 0 < error.max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wire", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_head_that_is_not_finite_reads_as_nan_and_spoils_no_other(send, wire, dtype, bad):
    pool = torch.randn(4, 3, 32).to(dtype)
    pool[2, 1, 17] = bad
    for reference in (False, True):
        staging = staging_of(2 * 4 * 3 * (32 + 2))
        send(pool, pool, torch.arange(4), staging, 0, wire, reference=reference)
        side = staging[: len(staging) // 2]
        codes, scales = side[: pool.numel()], side[pool.numel() :].view(torch.float16).view(4, 3, 1)
        read = codes.view(torch.int8 if wire == "int8" else torch.float8_e4m3fn).view(pool.shape).float() * scales
        assert torch.equal(staging, packed_by_python(pool, pool, torch.arange(4), wire))
        assert read[2, 1].isnan().all()
        assert read.isnan().sum() == 32


def test_rows_beyond_one_grid(send):
    """More rows than the grid has warps: some warps stride."""
    pool = torch.randn(20_000, 1, 4)
    rows = torch.randperm(20_000)
    staging = staging_of(2 * pool.numel() * 4)
    send(pool, -pool, rows, staging)
    assert torch.equal(staging.view(torch.float32).view(2, -1, 1, 4), torch.stack([pool[rows], -pool[rows]]))


def test_what_it_refuses(send):
    pool, staging, rows = torch.randn(4, 2, 3), staging_of(4096), torch.arange(4)
    with pytest.raises(ValueError, match="too small"):
        send(pool, pool, rows, staging, 4090)
    with pytest.raises(ValueError, match="refused"):  # odd head_dim: scales would not be aligned
        send(pool, pool, rows, staging, 0, "int8")
    with pytest.raises(ValueError, match="refused"):  # misaligned for float32
        send(pool, pool, rows, staging, 2)
    with pytest.raises(ValueError, match="one shape"):
        send(pool, pool[:2], rows, staging)
    with pytest.raises(ValueError, match="contiguous"):
        send(pool[:, :1], pool[:, :1], rows, staging)
    assert send(pool, pool, rows[:0], staging) == 0
    assert (staging == UNWRITTEN).all()


@needs_nvcc
def test_nvcc_compiles_it_without_a_spill(tmp_path):
    library, usages = compile_for_gpus(tmp_path)
    assert library.stat().st_size > 0
    assert {usage.architecture for usage in usages} == set(ARCHITECTURES)
    assert len({usage.kernel for usage in usages}) * len(ARCHITECTURES) == len(usages) == 8 * 4
    for usage in usages:
        print(usage)
        assert usage.spill_store_bytes == usage.spill_load_bytes == usage.stack_bytes == 0
        assert 0 < usage.registers <= 64


@needs_nvcc
def test_every_kernel_loads_and_stores_16_bytes_at_once(tmp_path):
    ptx = tmp_path / "kernels.ptx"
    subprocess.run(["nvcc", "-std=c++17", "-arch=sm_90", "-ptx", "-o", str(ptx), str(SOURCE)], check=True)
    entries = ptx.read_text().split(".entry ")[1:]
    assert len(entries) == 8
    for entry in entries:
        assert "ld.global.v4" in entry or "ld.global.nc.v4" in entry
        assert "st.global.v4" in entry


def test_a_spill_in_the_log_is_found():
    log = """ptxas info    : Compiling entry function '_ZN6pdtrim13quantise_rowsILi1ELi2EEEvNS_4ArgsE' for 'sm_90'
ptxas info    : Function properties for it
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 16 bytes cumulative stack size
"""
    (usage,) = parse_ptxas(log)
    assert (usage.kernel, usage.architecture, usage.registers) == ("quantise_rows float16 fp8", 90, 40)
    assert (usage.stack_bytes, usage.spill_store_bytes, usage.spill_load_bytes) == (16, 12, 20)
    with pytest.raises(ValueError, match="no registers"):
        parse_ptxas(log.replace("Used 40", "Has"))
