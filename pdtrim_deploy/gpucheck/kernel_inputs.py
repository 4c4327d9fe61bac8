"""What the kernels' checks move: plans and pools, and the form that moves them."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from pdtrim_deploy.gpucheck.checks import NotHere
from pdtrim_deploy.gpucheck.wireplan import Rule, Shape, WirePlan
from pdtrim_deploy.kvcache.gpu.library import library
from pdtrim_deploy.kvcache.key_constants import KeyConstants
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.plan.wire import FP8_ROWS, WireDtype


def form() -> ModuleType:
    """`kvcache.gpu.move`.

    Raises:
        NotHere: Triton cannot run here; a row of its own says why.

    """
    if (module := library()) is None:
        raise NotHere("Triton cannot run here: see the row kernels: Triton")
    return module


def offset_plan(
    wire: WireDtype, sizes: tuple[int, int, int], dtype: str, cut: bool = False
) -> tuple[WirePlan, KeyOffsets]:
    """A plan of `(layers, heads, head size)` whose layers all have key offsets and scales, and a pool of `dtype`.

    `cut`: every other layer keeps 4 + 64 rows.
    """
    layers, heads, head_dim = sizes
    fp8 = {str(pool): rows for pool, rows in FP8_ROWS.items()}
    model = Shape(heads, head_dim, fp8.get(dtype, dtype))
    generator = torch.Generator().manual_seed(1)
    constants = {}
    for layer in range(layers):
        mean = 30 * torch.randn(heads, head_dim, generator=generator)
        constants[layer] = KeyConstants.of(mean, torch.randint(-3, 4, (heads, head_dim // 2), generator=generator))
    offsets = KeyOffsets(constants, 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim), 1.2)
    rules = tuple(Rule(wire, 4, 64) if cut and layer % 2 else Rule(wire) for layer in range(layers))
    return WirePlan(model, rules, offsets=True), offsets


def odd_pools(count: int, size: int, model: Shape, seed: int) -> list[Tensor]:
    """Rows `[size, heads, head size]` of all magnitudes, zeros, infinities, NaN and subnormal numbers among them."""
    generator, dtype = torch.Generator().manual_seed(seed), getattr(torch, model.row_dtype)
    limits, pools = torch.finfo(dtype), []
    for _ in range(count):
        x = torch.randn(size, model.heads, model.head_dim, generator=generator, dtype=torch.float64)
        x *= torch.exp2(torch.randint(-30, 14, (size, model.heads, 1), generator=generator))
        pool = x.clamp(limits.min, limits.max).to(dtype)
        odd = (torch.nan, torch.inf, -torch.inf, limits.max, limits.smallest_normal / 2, 0.0, -0.0)
        for row, number in enumerate(odd):
            pool[row * 5 % size, row % model.heads, row * 7 % model.head_dim] = number
        pool[size // 2] = 0
        pools.append(pool)
    return pools
