"""Rows of latents (MLA) are views of one tensor a layer: every form packs them alike, and chunks bring the whole."""

from __future__ import annotations

import pytest
import torch

from pdtrim_deploy.kvcache import torch_pack
from pdtrim_deploy.kvcache.cpu import move as cpu
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack, unpack
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan

LAYERS, LATENT, ROPE, SLOTS, TOKENS = 2, 64, 12, 50, 37
WIRES = ("native", "fp8", "int8", "int4", "int3")


def plan_in(wire: str, dtype: str) -> PDPlan:
    shape = ModelShape(
        architecture="X", fingerprint="f", num_blocks=LAYERS, num_kv_heads=1, head_dim=LATENT, rope_dim=ROPE,
        kv_dtype=dtype,
    )  # fmt: skip
    return PDPlan.dense(shape).with_kv((KVSend(wire_dtype=wire),) * LAYERS)


def views(pools):
    """Rope keys and latents of pools `[slots, latent + rope]`, as a worker's pool holds them."""
    parts = (slice(LATENT, None), slice(LATENT))
    return [[pool[:, part].unflatten(1, (2, -1)) for pool in pools] for part in parts]


def random_pools(dtype: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.randint(-1, 3, (SLOTS, 1), generator=generator)
    return [
        (scales * torch.randn(SLOTS, LATENT + ROPE, generator=generator)).to(getattr(torch, dtype))
        for _ in range(LAYERS)
    ]


@pytest.mark.parametrize("slots", [torch.arange(3, 3 + TOKENS), torch.randperm(SLOTS)[:TOKENS]], ids=["run", "any"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wire", WIRES)
def test_the_compiled_form_has_torchs_bytes(wire, dtype, slots):
    pools, plan = random_pools(dtype), plan_in(wire, dtype)
    for start, stop in ((0, 5), (5, TOKENS)):
        layout, part = chunk_layout(plan, TOKENS, start, stop), slots[start:stop]
        expected, packed = (torch.full((layout.total_bytes,), 0xA5, dtype=torch.uint8) for _ in range(2))
        torch_pack.pack(layout, *views(pools), part, expected)
        assert cpu.move(layout, packed, *views(pools), part, pack=True)
        assert torch.equal(packed, expected)
        blank = [[torch.zeros_like(pool) for pool in pools] for _ in range(2)]
        torch_pack.unpack(layout, packed, *views(blank[0]), part)
        assert cpu.move(layout, packed, *views(blank[1]), part, pack=False)
        assert all(torch.equal(*both) for both in zip(*blank, strict=True))
        assert not any(pool[~torch.isin(torch.arange(SLOTS), part)].any() for pool in blank[1])


@pytest.mark.parametrize("wire", WIRES)
def test_rows_come_back_as_near_as_the_wire_dtype_says(wire):
    """Rope keys under int4 and int3 are as near as under int8; the first latent is exact there."""
    pools, plan, slots = random_pools("float32"), plan_in(wire, "float32"), torch.randperm(SLOTS)[:TOKENS]
    blank = [torch.zeros_like(pool) for pool in pools]
    for start, stop in ((0, 1), (1, 20), (20, TOKENS)):
        layout = chunk_layout(plan, TOKENS, start, stop)
        unpack(layout, pack(layout, *views(pools), slots[start:stop]), *views(blank), slots[start:stop])
    nearness = {"native": 0.0, "fp8": 0.05, "int8": 0.01, "int4": 0.12, "int3": 0.25}
    for got, row in zip(blank, pools, strict=True):
        rope, latent = (
            ((a[slots] - b[slots]).norm(dim=(1, 2)) / b[slots].norm(dim=(1, 2))).max()
            for (a,), (b,) in zip(views([got]), views([row]), strict=True)
        )
        assert latent <= nearness[wire]
        assert rope <= nearness["int8" if wire in ("int4", "int3") else wire]
        if wire != "native":
            assert latent > nearness[wire] / 20
        if wire in ("int4", "int3"):
            assert torch.equal(got[slots[0], :LATENT], row[slots[0], :LATENT])
            assert not torch.equal(got[slots[0], LATENT:], row[slots[0], LATENT:])
