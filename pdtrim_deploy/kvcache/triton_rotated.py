"""int4's and int3's kernel for GPUs: gather, rotate, quantise and pack in one pass, for heads of powers of two.

No product is added to right after it is made, unless it is exact: a compiler would fuse the two roundings into one.
(That of an offset is, and so the kernel is compiled without fusing.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdtrim_deploy.kvcache.codecs.rotated import SLACK, Grid, halvings
from pdtrim_deploy.kvcache.key_offsets import PartOffset
from pdtrim_deploy.kvcache.triton_offset import UNFUSED, offset_of
from pdtrim_deploy.plan.wire import rotated_group

BLOCK_ROWS = 16


def launch(pool: Tensor, slots: Tensor, sections: Sequence[Tensor], grid: Grid, less: PartOffset | None = None) -> None:
    """Pack rows `slots` of one layer's K or V, less an offset, into codes and scales."""
    _, heads, head_dim = pool.shape
    send_rotated_rows[(triton.cdiv(len(slots), BLOCK_ROWS), heads)](
        pool, slots, *sections, *(less or PartOffset(pool, pool, slots)), len(slots),
        **constants(heads, head_dim, grid), OFFSET=less is not None, **UNFUSED,
    )  # fmt: skip


def constants(heads: int, head_dim: int, grid: Grid) -> dict[str, int | float]:
    """What the kernel is compiled for; the floats as the codec has them."""
    unit = 2.0 ** -(halvings(head_dim) // 2)
    curve, per_largest = torch.tensor([grid.curve, SLACK / grid.edge]).tolist()
    return {
        "HEADS": heads, "DIM": head_dim, "GROUP": rotated_group(head_dim), "ROWS": BLOCK_ROWS, "BITS": grid.bits,
        "STAGES": halvings(head_dim), "UNIT": unit, "CURVE": curve, "PER_LARGEST": per_largest,
    }  # fmt: skip


@triton.jit
def send_rotated_rows(
    pool, slots, codes, scales, mean, table, positions, rows,
    HEADS: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr, CURVE: tl.constexpr, PER_LARGEST: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One program: `ROWS` rows of one KV head."""
    HALF: tl.constexpr = 2 ** (BITS - 1)
    GROUPS: tl.constexpr = DIM // GROUP
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    live = row < rows
    slot = tl.load(slots + row, mask=live, other=0).to(tl.int64)
    channel = tl.arange(0, DIM)
    at = (slot[:, None] * HEADS + head) * DIM + channel[None, :]
    x = tl.load(pool + at, mask=live[:, None], other=0.0).to(tl.float32)
    if OFFSET:
        x -= offset_of(mean + head * DIM, table, positions + row, live, channel, DIM)
    for stage in tl.static_range(STAGES):
        x = butterfly(x, ROWS, DIM, 2**stage)
    x = tl.reshape(x * UNIT, [ROWS, GROUPS, GROUP])
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)  # NaN is the largest
    largest = bits.to(tl.float32, bitcast=True)
    wanted = tl.where(bits > 0x7F800000, largest, tl.maximum(largest * PER_LARGEST, 0.0))  # a product not to be fused
    scale = (wanted + 5.9604644775390625e-08).to(tl.float16)  # + 2^-24
    finite = (tl.sum(not_finite(scale), axis=1) == 0)[:, None]
    part = (row[:, None] * HEADS + head) * GROUPS + tl.arange(0, GROUPS)[None, :]
    shown = tl.where(bits == 0, 0, scale.to(tl.int16, bitcast=True))
    shown = tl.where(finite, shown, 0x7E00).to(tl.int16)  # which NaN is part of the format
    tl.store(scales + part, shown.to(tl.float16, bitcast=True), mask=live[:, None])
    y = x * tl.math.div_rn(1.0, scale.to(tl.float32))[:, :, None]
    code = (tl.minimum(y * (CURVE - tl.abs(y)), HALF * 1.0) + HALF).to(tl.int32) & (2 * HALF - 1)
    code = tl.where(finite, tl.reshape(code, [ROWS, DIM]), 0)
    to = codes + (row[:, None] * HEADS + head) * (DIM * BITS // 8)
    if BITS == 4:
        first, second = halves(code, ROWS, DIM)
        tl.store(to + tl.arange(0, DIM // 2)[None, :], (first | (second << 4)).to(tl.uint8), mask=live[:, None])
    else:
        QUARTER: tl.constexpr = DIM // 4
        lower, upper = halves(code, ROWS, DIM)
        even, odd = tl.split(tl.reshape(lower, [ROWS, QUARTER, 2]))
        above, odd_above = tl.split(tl.reshape(upper, [ROWS, QUARTER, 2]))
        low = (even & 3) | ((odd & 3) << 2) | ((above & 3) << 4) | ((odd_above & 3) << 6)
        tl.store(to + tl.arange(0, QUARTER)[None, :], low.to(tl.uint8), mask=live[:, None])
        high = (even >> 2) | ((odd >> 2) << 1) | ((above >> 2) << 2) | ((odd_above >> 2) << 3)
        first, second = halves(high, ROWS, QUARTER)
        place = QUARTER + tl.arange(0, DIM // 8)
        tl.store(to + place[None, :], (first | (second << 4)).to(tl.uint8), mask=live[:, None])


@triton.jit
def halves(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The lower and the upper half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, WIDTH // 2]), (0, 2, 1)))


@triton.jit
def butterfly(x, ROWS: tl.constexpr, DIM: tl.constexpr, H: tl.constexpr):
    """Channels i and i + H become their sum and their difference."""
    a, b = tl.split(tl.permute(tl.reshape(x, [ROWS, DIM // (2 * H), 2, H]), (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), [ROWS, DIM])


@triton.jit
def not_finite(half):
    """1 for infinities and NaN, else 0."""
    return ((half.to(tl.int16, bitcast=True) & 0x7C00) == 0x7C00).to(tl.int32)
