"""`pack` for GPUs: gather, quantise and pack in one kernel, one or two launches a layer's side. Needs triton.

The bytes are those of `pdtrim_deploy.kvcache.pack`. It has been run in Triton's interpreter and compiled for sm_80,
sm_90 and sm_100, not run on a GPU: so nothing calls it by default. int4 and int3 have a kernel of their own
(`triton_rotated`), but go through the torch codec where the head size is not a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdtrim_deploy.kvcache import triton_rotated
from pdtrim_deploy.kvcache.codecs import get_codec
from pdtrim_deploy.kvcache.codecs.base import Pages
from pdtrim_deploy.kvcache.codecs.rotated import GRIDS
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets, PartOffset, part_offset
from pdtrim_deploy.kvcache.layout import ChunkLayout
from pdtrim_deploy.kvcache.sections import part_sections
from pdtrim_deploy.kvcache.triton_offset import UNFUSED, offset_of

NATIVE, INT8, FP8 = (tl.constexpr(kind) for kind in range(3))
KINDS = {"native": 0, "int8": 1, "fp8": 2}
BLOCK_ROWS = 16


def pack(
    layout: ChunkLayout,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    out: Tensor | None = None,
    offsets: KeyOffsets | None = None,
) -> Tensor:
    """As `pdtrim_deploy.kvcache.pack.pack`; all tensors on one device, pools contiguous."""
    if out is None:
        out = torch.empty(layout.total_bytes, dtype=torch.uint8, device=slots.device)
    out = out[: layout.total_bytes]
    for rows in layout.layers:
        picked = torch.cat([slots[lo:hi] for lo, hi in rows.ranges])
        for side, pools in enumerate((keys, values)):
            pool = pools[rows.prefill_layer]
            for part in rows.sides[side]:
                chosen, sections = picked[part.first :][: part.rows], part_sections(out, part, pool)
                less = part_offset(rows, side, part, pool, offsets)
                if part.code in KINDS:
                    launch(pool, chosen, sections, KINDS[part.code], less)
                elif pool.shape[-1].bit_count() == 1:
                    triton_rotated.launch(pool, chosen, sections, GRIDS[part.code], less)
                else:
                    every = less.rows(slice(None)) if less else None
                    get_codec(part.code).encode(pool, Pages(chosen, 1), sections, every)
    return out


def launch(pool: Tensor, slots: Tensor, sections: Sequence[Tensor], kind: int, less: PartOffset | None = None) -> None:
    """Pack rows `slots` of one layer's K or V, less an offset, into its sections: codes (or values) and scales."""
    _, heads, head_dim = pool.shape
    codes = sections[0].view(torch.uint8) if kind else sections[0]
    send_rows[(triton.cdiv(len(slots), BLOCK_ROWS), heads)](
        pool, slots, codes, sections[-1], *(less or PartOffset(pool, pool, slots)), len(slots),
        HEADS=heads, DIM=head_dim, WIDTH=triton.next_power_of_2(head_dim), ROWS=BLOCK_ROWS, KIND=kind,
        OFFSET=less is not None, **UNFUSED,
    )  # fmt: skip


@triton.jit
def send_rows(
    pool, slots, codes, scales, mean, table, positions, rows,
    HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KIND: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """One program: `ROWS` rows of one KV head."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    live = row < rows
    whole = live[:, None] & (channel < DIM)[None, :]
    slot = tl.load(slots + row, mask=live, other=0).to(tl.int64)
    x = tl.load(pool + (slot[:, None] * HEADS + head) * DIM + channel[None, :], mask=whole, other=0.0)
    to = codes + (row[:, None] * HEADS + head) * DIM + channel[None, :]
    if KIND == NATIVE:
        tl.store(to, x, mask=whole)
    else:
        x = x.to(tl.float32)
        if OFFSET:
            x -= offset_of(mean + head * DIM, table, positions + row, live, channel, DIM)
        steps: tl.constexpr = 127.0 if KIND == INT8 else 448.0
        largest = tl.max(tl.abs(x), axis=1)
        finite = tl.sum((x * 0.0 != 0.0).to(tl.int32), axis=1) == 0  # a maximum may hide NaN
        scale = tl.minimum(largest * (1.0 / steps), 65504.0).to(tl.float16)
        bits = tl.where(finite, scale.to(tl.int16, bitcast=True), 0x7E00)  # which NaN is part of the format
        tl.store(scales + row * HEADS + head, bits.to(tl.float16, bitcast=True), mask=live)
        wide = scale.to(tl.float32)
        inverse = tl.where(wide == 0.0, 0.0, tl.math.div_rn(1.0, tl.where(wide == 0.0, 1.0, wide)))
        y = tl.minimum(tl.maximum(x * inverse[:, None], -steps), steps)
        y = tl.where(finite[:, None], y, 0.0)
        tl.store(to, int8_code(y) if KIND == INT8 else e4m3_code(y), mask=whole)


@triton.jit
def int8_code(y):
    """Nearest integer, ties to even: added to 1.5 * 2^23 it stands in the low bits."""
    return ((y + 12582912.0).to(tl.int32, bitcast=True) & 0xFF).to(tl.uint8)


@triton.jit
def e4m3_code(y):
    """Nearest e4m3, ties to even, in integers: sm_80 has no instruction for it, and one text serves all. |y| <= 448."""
    bits = y.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) - (120 << 23)) >> 20
    # Below 2^-6 a code counts steps of 2^-9: added to 2^14, whose last bit is that, they stand in the low bits.
    small = (tl.abs(y) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude < (121 << 23), small, normal) | ((bits >> 24) & 0x80)
    return code.to(tl.uint8)
