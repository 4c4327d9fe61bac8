"""Where the sections of one part of a layer's K or V lie in packed bytes."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.layout import Part
from pdtrim_deploy.plan.wire import ITEM_BYTES, row_sections


def section_offsets(part: Part, native: str, heads: int, head_dim: int) -> list[int]:
    """Byte at which each section of a part begins in the packed bytes, and the end of the last."""
    kinds = row_sections(part.code, native, head_dim)
    sizes = (part.rows * heads * kind.per_head * ITEM_BYTES[kind.dtype] for kind in kinds)
    return list(accumulate(sizes, initial=part.offset))


def part_sections(packed: Tensor, part: Part, pool: Tensor) -> list[Tensor]:
    """Views of a part's sections in `packed`, `[rows, kv_heads, per_head]` each."""
    _, heads, head_dim = pool.shape
    native = native_name(pool.dtype)
    dtypes = [getattr(torch, kind.dtype) for kind in row_sections(part.code, native, head_dim)]
    pieces = [packed[lo:hi] for lo, hi in pairwise(section_offsets(part, native, heads, head_dim))]
    return [piece.view(dtype).view(part.rows, heads, -1) for piece, dtype in zip(pieces, dtypes, strict=True)]


def native_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
