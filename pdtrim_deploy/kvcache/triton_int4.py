"""int4's kernel for GPUs: gather, rotate, quantise and pack in one pass, for head sizes that are powers of two.

No product is added to right after it is made, unless it is exact: a compiler would fuse the two roundings into one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdtrim_deploy.kvcache.codecs.int4 import CURVE, EDGE, SLACK, halvings
from pdtrim_deploy.wire import int4_group

BLOCK_ROWS = 16


def launch(keys: Tensor, values: Tensor, slots: Tensor, k: Sequence[Tensor], v: Sequence[Tensor]) -> None:
    """Pack one layer's rows `slots` into its sections: K's and V's codes and scales."""
    _, heads, head_dim = keys.shape
    grid = (triton.cdiv(len(slots), BLOCK_ROWS), heads, 2)
    send_int4_rows[grid](
        keys, values, slots, *k, *v, len(slots), **constants(heads, head_dim),
    )  # fmt: skip


def constants(heads: int, head_dim: int) -> dict[str, int | float]:
    """What the kernel is compiled for; the floats as the codec has them."""
    unit = 2.0 ** -(halvings(head_dim) // 2)
    curve, per_largest = torch.tensor([CURVE, SLACK / EDGE]).tolist()
    return {
        "HEADS": heads, "DIM": head_dim, "GROUP": int4_group(head_dim), "ROWS": BLOCK_ROWS,
        "STAGES": halvings(head_dim), "UNIT": unit, "CURVE": curve, "PER_LARGEST": per_largest,
    }  # fmt: skip


@triton.jit
def send_int4_rows(
    keys, values, slots, k_codes, k_scales, v_codes, v_scales, rows,
    HEADS: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr, CURVE: tl.constexpr, PER_LARGEST: tl.constexpr,
):  # fmt: skip
    """One program: `ROWS` rows of one KV head of K (grid axis 2 = 0) or V (1)."""
    GROUPS: tl.constexpr = DIM // GROUP
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    if tl.program_id(2) == 0:
        pool, codes, scales = keys, k_codes, k_scales
    else:
        pool, codes, scales = values, v_codes, v_scales
    live = row < rows
    slot = tl.load(slots + row, mask=live, other=0).to(tl.int64)
    at = (slot[:, None] * HEADS + head) * DIM + tl.arange(0, DIM)[None, :]
    x = tl.load(pool + at, mask=live[:, None], other=0.0).to(tl.float32)
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
    code = (tl.minimum(y * (CURVE - tl.abs(y)), 8.0) + 8.0).to(tl.int32) & 0xF
    code = tl.where(finite, tl.reshape(code, [ROWS, DIM]), 0)
    first, second = tl.split(tl.permute(tl.reshape(code, [ROWS, 2, DIM // 2]), (0, 2, 1)))
    byte = (row[:, None] * HEADS + head) * (DIM // 2) + tl.arange(0, DIM // 2)[None, :]
    tl.store(codes + byte, (first | (second << 4)).to(tl.uint8), mask=live[:, None])


@triton.jit
def butterfly(x, ROWS: tl.constexpr, DIM: tl.constexpr, H: tl.constexpr):
    """Channels i and i + H become their sum and their difference."""
    a, b = tl.split(tl.permute(tl.reshape(x, [ROWS, DIM // (2 * H), 2, H]), (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), [ROWS, DIM])


@triton.jit
def not_finite(half):
    """1 for infinities and NaN, else 0."""
    return ((half.to(tl.int16, bitcast=True) & 0x7C00) == 0x7C00).to(tl.int32)
