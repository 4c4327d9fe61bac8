"""Pack and unpack on a GPU: their bytes, their share of a copy's bandwidth, their launches.

`kernel_checks()` is the whole part. It needs torch, triton and pydantic, no SGLang, no transformers and no network. By
itself:

    python -m pdtrim_deploy.gpucheck.kernels
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pdtrim_deploy.gpucheck.checks import Check, Figure, rows_of
from pdtrim_deploy.kvcache import torch_pack
from pdtrim_deploy.kvcache.checksum import torch_checksum
from pdtrim_deploy.kvcache.gpu.library import library
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.kvcache.layout import ChunkLayout, chunk_layout
from pdtrim_deploy.plan import KVSend, ModelShape, NativeDtype, PDPlan
from pdtrim_deploy.plan.wire import (
    FP8_ROWS,
    HEAD_DIM_MULTIPLE,
    LATENT_SIDES,
    POOL_DTYPES,
    SMALLER_THAN_FP8,
    WIRE_DTYPES,
    PoolDtype,
    WireDtype,
)

DTYPES: tuple[NativeDtype, ...] = ("float32", "float16", "bfloat16")
HEAD_DIMS = (64, 80, 96, 128, 256)
USUAL_HEAD_DIMS = (128,)  # of pools that are not bfloat16: each further size costs a second or two of compilation
LLAMA = (32, 8, 128)  # layers, KV heads and head size of Llama-3.1-8B
TOKENS, REPEATS = 4096, 20
CHECKSUM_BYTES = (1, 8, 4095, 32_768, 100_003, 8_000_005)


def kernel_checks(device: torch.device | None = None) -> list[Check]:
    """Bandwidth and launches of each wire dtype, the checksum, then bits of each wire and pool dtype.

    Bits come last, since they compile most: a kernel for each head size, pool dtype, wire dtype and direction.
    """
    if device is None:
        if not torch.cuda.is_available():
            return [Check("kernels", skip="torch sees no CUDA device")]
        device = torch.device("cuda", torch.cuda.current_device())
    if library() is None:
        return [Check("kernels", skip="Triton is missing or cannot compile here; the log says why")]
    checks = []
    for wire in WIRE_DTYPES:
        checks.append(Check(f"kernels: bandwidth, {wire}", partial(bandwidth, device, wire), 5))
        checks.append(Check(f"kernels: launches, {wire}", partial(launches, device, wire), 5))
    checks.append(Check("kernels: checksum", partial(checksums, device), 3))
    for wire in WIRE_DTYPES:
        for dtype in ("bfloat16", "float16", "float32", *(FP8_ROWS if wire in SMALLER_THAN_FP8 else ())):
            seconds = 15 if dtype == "bfloat16" else 5
            checks.append(Check(f"kernels: bits, {wire} from {dtype}", partial(bits, device, wire, dtype), seconds))
    for latent in LATENT_SIDES:
        checks.append(Check(f"kernels: bits, latents in {latent}", partial(latent_bits, device, latent), 5))
    return checks


# --- bits -----------------------------------------------------------------------------------------------------------


def bits(device: torch.device, wire: WireDtype, dtype: NativeDtype | PoolDtype, tokens: int = 200) -> Figure:
    """Packed bytes and unpacked pools of the kernels against torch's on the CPU; all head sizes from bfloat16.

    Raises:
        AssertionError: some differ; the sentence has the head size, and whether torch's own on the device do too.

    """
    compared = 0
    for head_dim in HEAD_DIMS if dtype == "bfloat16" else USUAL_HEAD_DIMS:
        if head_dim % HEAD_DIM_MULTIPLE[wire]:
            continue
        plan, offsets = _plan(wire, (3, 3, head_dim), dtype, cut=True)
        keys, values = (_pools(3, tokens + 9, plan.model, side) for side in range(2))
        slots = torch.randperm(tokens + 9, generator=torch.Generator().manual_seed(2))[:tokens]
        for start, stop in ((0, tokens // 3), (tokens // 3, tokens)):
            layout, here = chunk_layout(plan, tokens, start, stop), slots[start:stop]
            packed = torch_pack.pack(layout, keys, values, here, offsets=offsets)
            pools = [torch.full_like(pool, -9) for pool in keys + values]
            torch_pack.unpack(layout, packed, pools[:3], pools[3:], here, offsets)
            got, moved = _on_device(device, layout, keys, values, here, offsets, packed)
            bad = int((packed != got).sum())
            rest = sum(int((_as_words(a) != _as_words(b)).sum()) for a, b in zip(pools, moved, strict=True))
            if bad or rest:
                there_keys, there_values = ([pool.to(device) for pool in side] for side in (keys, values))
                own = torch_pack.pack(
                    layout, there_keys, there_values, here.to(device), offsets=offsets.to(device)
                ).cpu()
                raise AssertionError(
                    f"head size {head_dim}, tokens {start} to {stop}: {bad} of {len(packed)} packed bytes and {rest} "
                    f"unpacked values differ from torch's on the CPU; of torch's own on the device "
                    f"{int((packed != own).sum())} bytes"
                )
            compared += len(packed)
    return {"bytes_compared": compared, "bytes_different": 0}


def latent_bits(device: torch.device, wire: WireDtype, tokens: int = 200) -> Figure:
    """The same of DeepSeek's latents and rope keys, in a bfloat16 pool: views of one tensor a layer.

    Raises:
        AssertionError: some differ.

    """
    model = ModelShape(
        architecture="X", fingerprint="check", num_blocks=3, num_kv_heads=1, head_dim=512, rope_dim=64,
        kv_dtype="bfloat16",
    )  # fmt: skip
    plan, row = PDPlan.dense(model).with_kv((KVSend(wire_dtype=wire),) * 3), 512 + 64
    pools = _pools(3, tokens + 9, model.model_copy(update={"head_dim": row, "rope_dim": None}), 0)
    slots = torch.randperm(tokens + 9, generator=torch.Generator().manual_seed(2))[:tokens]
    compared = 0
    for start, stop in ((0, tokens // 3), (tokens // 3, tokens)):
        layout, here = chunk_layout(plan, tokens, start, stop), slots[start:stop]
        packed = torch_pack.pack(layout, *_parts(pools), here)
        expected = [torch.full_like(pool, -9) for pool in pools]
        torch_pack.unpack(layout, packed, *_parts(expected), here)
        keys, values = _parts([pool.to(device) for pool in pools])
        moved = [torch.full_like(pool, -9, device=device) for pool in pools]
        got, _ = _on_device(device, layout, keys, values, here, None, packed, _parts(moved))
        bad = int((packed != got).sum())
        rest = sum(int((_as_words(a) != _as_words(b.cpu())).sum()) for a, b in zip(expected, moved, strict=True))
        if bad or rest:
            raise AssertionError(f"{bad} of {len(packed)} packed bytes and {rest} unpacked values differ from torch's")
        compared += len(packed)
    return {"bytes_compared": compared, "bytes_different": 0}


def checksums(device: torch.device, sizes: tuple[int, ...] = CHECKSUM_BYTES) -> Figure:
    """The checksum's kernel against torch's on the CPU, over sizes that end within a word and within a block.

    Raises:
        AssertionError: they differ.

    """
    from pdtrim_deploy.kvcache.gpu.checksum import launched

    for size in sizes:
        data = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
        expected, got = int(torch_checksum(data)), int(launched(data.to(device)))
        assert got == expected, f"of {size} bytes the kernel computes {got:#x}, torch on the CPU {expected:#x}"
    return {"bytes_compared": sum(sizes), "sizes": len(sizes)}


def _parts(pools: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Rope keys and latents of pools `[slots, 1, latent + rope]`, in halves."""
    rope, latent = (
        [pool[:, 0, part].unflatten(1, (2, -1)) for pool in pools] for part in (slice(512, None), slice(512))
    )
    return rope, latent


def _on_device(
    device: torch.device, layout: ChunkLayout, keys: list[Tensor], values: list[Tensor], slots: Tensor,
    offsets: KeyOffsets | None, packed: Tensor, into: tuple[list[Tensor], list[Tensor]] | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """What the kernels pack of these pools, and the pools that they unpack `packed` into, both on the CPU again.

    Pools that are there already stay the views that they are; `into` is what is unpacked into, else new pools.
    """
    form, there = library(), None if offsets is None else offsets.to(device)
    assert form is not None, "Triton cannot run here"
    got = torch.full_like(packed, 0xA5, device=device)
    source = [[pool.to(device) for pool in side] for side in (keys, values)]
    new_keys, new_values = into or ([torch.full_like(pool, -9) for pool in side] for side in source)
    moved = [*new_keys, *new_values]
    assert form.move(layout, got, *source, slots.to(device), there, pack=True), "the kernels refused this chunk"
    form.move(layout, packed.to(device), new_keys, new_values, slots.to(device), there, pack=False)
    got, moved = got.cpu(), [pool.cpu() for pool in moved]
    form.check(device)
    return got, moved


def _as_words(pool: Tensor) -> Tensor:
    """Bits, all NaN alike: which NaN arithmetic makes is a device's own."""
    words = pool.view({4: torch.int32, 2: torch.int16, 1: torch.int8}[pool.element_size()])
    return words.masked_fill(pool.float().isnan(), -1)


def _plan(
    wire: WireDtype, sizes: tuple[int, int, int], dtype: NativeDtype | PoolDtype, cut: bool = False
) -> tuple[PDPlan, KeyOffsets]:
    """A plan whose layers all have key offsets and a pool of `dtype`; `cut`: every other layer keeps 4 + 64 rows."""
    layers, heads, head_dim = sizes
    model = ModelShape(
        architecture="X", fingerprint="check", num_blocks=layers, num_kv_heads=heads, head_dim=head_dim,
        kv_dtype=next((native for native in DTYPES if native == dtype), "bfloat16"),
        pool_dtype=next((pool for pool in POOL_DTYPES if pool == dtype), "native"),
    )  # fmt: skip
    whole, less = KVSend(wire_dtype=wire), KVSend(wire_dtype=wire, mode="sparse", n_first=4, n_last=64)
    generator = torch.Generator().manual_seed(1)
    means = {layer: 30 * torch.randn(heads, head_dim, generator=generator) for layer in range(layers)}
    offsets = KeyOffsets(means, 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim), 1.2, b"")
    sends = tuple(less if cut and layer % 2 else whole for layer in range(layers))
    return PDPlan.dense(model).with_kv(sends).with_key_offsets(offsets.file), offsets


def _pools(count: int, size: int, model: ModelShape, seed: int) -> list[Tensor]:
    """Rows of all magnitudes, zeros, infinities, NaN and subnormal numbers among them."""
    generator, dtype = torch.Generator().manual_seed(seed), getattr(torch, model.row_dtype)
    limits, pools = torch.finfo(dtype), []
    for _ in range(count):
        x = torch.randn(size, model.num_kv_heads, model.head_dim, generator=generator, dtype=torch.float64)
        x *= torch.exp2(torch.randint(-30, 14, (size, model.num_kv_heads, 1), generator=generator))
        pool = x.clamp(limits.min, limits.max).to(dtype)
        odd = (torch.nan, torch.inf, -torch.inf, limits.max, limits.smallest_normal / 2, 0.0, -0.0)
        for row, number in enumerate(odd):
            pool[row * 5 % size, row % model.num_kv_heads, row * 7 % model.head_dim] = number
        pool[size // 2] = 0
        pools.append(pool)
    return pools


# --- bandwidth and launches -----------------------------------------------------------------------------------------


def bandwidth(device: torch.device, wire: WireDtype, tokens: int = TOKENS, repeats: int = REPEATS) -> Figure:
    """GB/s, all bytes read and written, of a chunk of Llama-3.1-8B in pages of 64, beside a copy of as many bytes."""
    steps, traffic = _llama(device, wire, tokens)
    source = torch.empty(traffic // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timed = {"copy": lambda: target.copy_(source), **steps}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(3):
        for run in timed.values():
            run()
    for _ in range(repeats):
        for name, run in timed.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            seconds[name].append(begin.elapsed_time(end) / 1e3)
    median = {name: statistics.median(took) for name, took in seconds.items()}
    figure: Figure = {"tokens": tokens, "bytes_read_and_written": traffic, "repeats": repeats}
    for name, took in median.items():
        figure[f"{name}_gb_per_s"] = traffic / took / 1e9
        figure[f"{name}_seconds"] = took
        if name != "copy":
            figure[f"{name}_of_copy"] = median["copy"] / took
    return figure


def launches(device: torch.device, wire: WireDtype, tokens: int = 512) -> Figure:
    """What the profiler sees of one chunk: of a new one, and of one whose table is on the GPU already.

    Raises:
        AssertionError: more than two operations on the GPU, or a wait for it.

    """
    figure: Figure = {}
    for step in _llama(device, wire, tokens - 64)[0].values():  # compiles
        _profiled(step)
    for name, step in _llama(device, wire, tokens)[0].items():
        for state in ("new", "known"):
            operations, waits = _profiled(step)
            figure[f"{name}_{state}_operations"], figure[f"{name}_{state}_waits"] = operations, waits
    broken = [name for name, count in figure.items() if int(count) > (0 if name.endswith("waits") else 2)]
    assert not broken, f"more than 2 operations on the GPU, or a wait for it: {figure}"
    return figure


def _profiled(step: Callable[[], object]) -> tuple[int, int]:
    """Kernels and copies that a call puts on the GPU, and calls of the runtime in it that wait for the GPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function("pdtrim chunk"):
            step()
        torch.cuda.synchronize()
    events: list[Any] = list(profiler.events())
    span = next(event for event in events if event.name == "pdtrim chunk" and event.device_type == DeviceType.CPU)
    within = [
        event
        for event in events
        if event.device_type == DeviceType.CPU
        and span.time_range.start <= event.time_range.start <= span.time_range.end
    ]
    operations = [e for e in events if e.device_type == DeviceType.CUDA and e.name != "pdtrim chunk"]
    waits = [event for event in within if "Synchronize" in event.name or event.name == "cudaMemcpy"]
    return len(operations), len(waits)


def _llama(device: torch.device, wire: WireDtype, tokens: int) -> tuple[dict[str, Callable[[], object]], int]:
    """Pack and unpack of one chunk of Llama-3.1-8B by name, and the bytes that each reads and writes."""
    form = library()
    assert form is not None, "Triton cannot run here"
    plan, offsets = _plan(wire, LLAMA, "bfloat16")
    layers, heads, head_dim = LLAMA
    pages = torch.randperm(2 * tokens // 64, generator=torch.Generator().manual_seed(0))
    slots = (pages[:, None] * 64 + torch.arange(64)).flatten()[:tokens].to(device)
    keys, values = (
        [torch.randn(2 * tokens, heads, head_dim, dtype=torch.bfloat16, device=device) for _ in range(layers)]
        for _ in range(2)
    )
    layout, there = chunk_layout(plan, tokens), offsets.to(device)
    there.table(tokens)
    packed = torch.zeros(layout.total_bytes, dtype=torch.uint8, device=device)
    steps: dict[str, Callable[[], object]] = {
        "pack": lambda: form.move(layout, packed, keys, values, slots, there, pack=True),
        "unpack": lambda: form.move(layout, packed, keys, values, slots, there, pack=False),
    }
    return steps, plan.dense_bytes(tokens) + layout.total_bytes


def main() -> None:
    """Print the rows."""
    for row in rows_of(kernel_checks()):
        print(asdict(row), flush=True)


if __name__ == "__main__":
    main()
