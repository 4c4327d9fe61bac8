"""Key offsets in kernels for GPUs: the arithmetic of `key_offsets`, in its order. Needs triton."""

from __future__ import annotations

import triton
import triton.language as tl

UNFUSED = {"enable_fp_fusion": False}  # a product, then a sum: fused they would be rounded once instead of twice


@triton.jit
def offset_of(mean, table, positions, live, channel, DIM: tl.constexpr):
    """float32 `[rows, channels]`: the offset of one head in rows at `positions`; 0 in rows that are not `live`."""
    HALF: tl.constexpr = DIM // 2
    lower = channel < HALF
    inside = channel < DIM
    own = tl.load(mean + channel, mask=inside, other=0.0)
    partner = tl.load(mean + tl.where(lower, channel + HALF, channel - HALF), mask=inside, other=0.0)
    partner = tl.where(lower, -partner, partner)
    turn = (
        table
        + tl.load(positions, mask=live, other=0)[:, None] * DIM
        + tl.where(lower, channel, channel - HALF)[None, :]
    )
    whole = live[:, None] & inside[None, :]
    cosine = tl.load(turn, mask=whole, other=0.0)
    sine = tl.load(turn + HALF, mask=whole, other=0.0)
    return own[None, :] * cosine + partner[None, :] * sine
