"""Bytes of the Triton kernels on a GPU against those of torch on the CPU: pack, unpack, checksum."""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_deploy.gpucheck.checks import Figure
from pdtrim_deploy.gpucheck.kernel_inputs import form, odd_pools, offset_plan
from pdtrim_deploy.gpucheck.wireplan import Rule, Shape, WirePlan
from pdtrim_deploy.kvcache import torch_pack
from pdtrim_deploy.kvcache.checksum import torch_checksum
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.kvcache.layout import ChunkLayout, chunk_layout
from pdtrim_deploy.plan.wire import HEAD_DIM_MULTIPLE, WireDtype

HEAD_DIMS = (64, 80, 96, 128, 256)
USUAL_HEAD_DIMS = (128,)  # of pools that are not bfloat16: each further size costs a second or two of compilation
LATENT, ROPE = 512, 64  # DeepSeek's
CHECKSUM_BYTES = (1, 8, 4095, 32_768, 100_003, 8_000_005)


def bits(device: torch.device, wire: WireDtype, dtype: str, tokens: int = 200) -> Figure:
    """Packed bytes and unpacked pools of the kernels against torch's on the CPU; all head sizes from bfloat16.

    Raises:
        AssertionError: some differ; the sentence has the head size, and whether torch's own on the device do too.

    """
    form()
    compared = 0
    for head_dim in HEAD_DIMS if dtype == "bfloat16" else USUAL_HEAD_DIMS:
        if head_dim % HEAD_DIM_MULTIPLE[wire]:
            continue
        plan, offsets = offset_plan(wire, (3, 3, head_dim), dtype, cut=True)
        keys, values = (odd_pools(3, tokens + 9, plan.model, side) for side in range(2))
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
                by_torch = torch_pack.pack(
                    layout, there_keys, there_values, here.to(device), offsets=offsets.to(device)
                ).cpu()
                raise AssertionError(
                    f"head size {head_dim}, tokens {start} to {stop}: {bad} of {len(packed)} packed bytes and {rest} "
                    f"unpacked values differ from torch's on the CPU; of torch's own on the device "
                    f"{int((packed != by_torch).sum())} bytes"
                )
            compared += len(packed)
    return {"bytes_compared": compared, "bytes_different": 0}


def latent_bits(device: torch.device, wire: WireDtype, tokens: int = 200) -> Figure:
    """The same of DeepSeek's latents and rope keys, in a bfloat16 pool: views of one tensor a layer.

    Raises:
        AssertionError: some differ.

    """
    form()
    plan = WirePlan(Shape(1, LATENT, "bfloat16", ROPE), (Rule(wire),) * 3)
    pools = odd_pools(3, tokens + 9, Shape(1, LATENT + ROPE, "bfloat16"), 0)
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
    form()
    from pdtrim_deploy.kvcache.gpu.checksum import launched

    for size in sizes:
        data = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
        expected, got = int(torch_checksum(data)), int(launched(data.to(device)))
        assert got == expected, f"of {size} bytes the kernel computes {got:#x}, torch on the CPU {expected:#x}"
    return {"bytes_compared": sum(sizes), "sizes": len(sizes)}


def _parts(pools: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Rope keys and latents of pools `[slots, 1, latent + rope]`, in halves."""
    rope, latent = (
        [pool[:, 0, part].unflatten(1, (2, -1)) for pool in pools] for part in (slice(LATENT, None), slice(LATENT))
    )
    return rope, latent


def _on_device(
    device: torch.device, layout: ChunkLayout, keys: list[Tensor], values: list[Tensor], slots: Tensor,
    offsets: KeyOffsets | None, packed: Tensor, into: tuple[list[Tensor], list[Tensor]] | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """What the kernels pack of these pools, and the pools that they unpack `packed` into, both on the CPU again.

    Pools that are there already stay the views that they are; `into` is what is unpacked into, else new pools.
    """
    gpu, there = form(), None if offsets is None else offsets.to(device)
    got = torch.full_like(packed, 0xA5, device=device)
    source = [[pool.to(device) for pool in side] for side in (keys, values)]
    new_keys, new_values = into or ([torch.full_like(pool, -9) for pool in side] for side in source)
    moved = [*new_keys, *new_values]
    assert gpu.move(layout, got, *source, slots.to(device), there, pack=True), "the kernels refused this chunk"
    gpu.move(layout, packed.to(device), new_keys, new_values, slots.to(device), there, pack=False)
    got, moved = got.cpu(), [pool.cpu() for pool in moved]
    gpu.check(device)
    return got, moved


def _as_words(pool: Tensor) -> Tensor:
    """Bits, all NaN alike: which NaN arithmetic makes is a device's own."""
    words = pool.view({4: torch.int32, 2: torch.int16, 1: torch.int8}[pool.element_size()])
    return words.masked_fill(pool.float().isnan(), -1)
