"""Where the sections of one side (K or V) of one layer lie in packed bytes."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.layout import LayerRows
from pdtrim_deploy.wire import ITEM_BYTES, row_sections


def section_offsets(rows: LayerRows, side: int, native: str, heads: int, head_dim: int) -> list[int]:
    """Byte at which each section of K (side 0) or V (1) begins in the packed bytes, and the end of the last."""
    kinds = row_sections(rows.wire_dtype, native, head_dim)
    sizes = (rows.rows * heads * kind.per_head * ITEM_BYTES[kind.dtype] for kind in kinds)
    return list(accumulate(sizes, initial=rows.offset + side * rows.side_bytes))


def side_sections(packed: Tensor, rows: LayerRows, side: int, pool: Tensor) -> list[Tensor]:
    """Views of K's (side 0) or V's (1) sections in `packed`, `[rows, kv_heads, per_head]` each."""
    _, heads, head_dim = pool.shape
    native = native_name(pool)
    dtypes = [getattr(torch, kind.dtype) for kind in row_sections(rows.wire_dtype, native, head_dim)]
    parts = [packed[lo:hi] for lo, hi in pairwise(section_offsets(rows, side, native, heads, head_dim))]
    return [part.view(dtype).view(rows.rows, heads, -1) for part, dtype in zip(parts, dtypes, strict=True)]


def native_name(pool: Tensor) -> str:
    """`float32` for `torch.float32`."""
    return str(pool.dtype).removeprefix("torch.")
