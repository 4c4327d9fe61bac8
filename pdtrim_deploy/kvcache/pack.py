"""Move KV between a paged pool and the packed bytes of a `ChunkLayout`, through the codecs of its wire dtypes.

Rows go in blocks small enough for a CPU's cache, so that a codec's steps touch memory once; a block whose slots are
a run is read and written in place, any other by one gather or scatter of the largest pages that its slots make.
On other devices a layer's side is one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.codecs import get_codec
from pdtrim_deploy.kvcache.codecs.base import Index, Pages, put
from pdtrim_deploy.kvcache.layout import ChunkLayout, LayerRows
from pdtrim_deploy.wire import row_sections

BLOCK_VALUES = 1 << 17  # half a megabyte in float32
PAGE_SIZES = (64, 16, 4)  # of slots that come in whole pages; a pool with pages of 32 has whole ones of 16


def pack(
    layout: ChunkLayout,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Gather, quantise and pack a chunk's rows from the prefill pool.

    Args:
        keys, values: one pool tensor per *prefill* layer, `[pool_slots, kv_heads, head_dim]`, native dtype.
        slots: int64 `[stop - start]`, the pool slot of each token of the chunk.
        out: uint8 staging buffer of at least `layout.total_bytes`, aligned to 4 bytes; made when left out.

    Returns:
        uint8 `[layout.total_bytes]`, a view of `out` when it was given.

    """
    if out is None:
        out = torch.empty(layout.total_bytes, dtype=torch.uint8, device=slots.device)
    out = out[: layout.total_bytes]
    for rows, blocks in _blocks(layout, slots, keys[0]):
        codec = get_codec(rows.wire_dtype)
        for side, pool in enumerate((keys[rows.prefill_layer], values[rows.prefill_layer])):
            sections = side_sections(out, rows, side, pool)
            for at, index in blocks:
                codec.encode(pool, index, [section[at] for section in sections])
    return out


def unpack(
    layout: ChunkLayout,
    packed: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
) -> None:
    """Scatter packed bytes into the decode pool; rows that were not sent are left untouched.

    Args:
        packed: uint8, `layout.total_bytes` long, as `pack` made it, aligned to 4 bytes.
        keys, values: one pool tensor per *decode* layer, `[pool_slots, kv_heads, head_dim]`.
        slots: int64 `[stop - start]`, the pool slot of each token of the chunk.

    """
    for rows, blocks in _blocks(layout, slots, keys[0]):
        codec = get_codec(rows.wire_dtype)
        for side, pool in enumerate((keys[rows.decode_layer], values[rows.decode_layer])):
            sections = side_sections(packed, rows, side, pool)
            for at, index in blocks:
                put(pool, index, codec.decode([section[at] for section in sections]))


def side_sections(packed: Tensor, rows: LayerRows, side: int, pool: Tensor) -> list[Tensor]:
    """Views of K's (side 0) or V's (1) sections in `packed`, `[rows, kv_heads, per_head]` each."""
    _, heads, head_dim = pool.shape
    kinds = row_sections(rows.wire_dtype, str(pool.dtype).removeprefix("torch."), head_dim)
    dtypes = [getattr(torch, kind.dtype) for kind in kinds]
    sizes = [rows.rows * heads * kind.per_head * dtype.itemsize for kind, dtype in zip(kinds, dtypes, strict=True)]
    ends = list(accumulate(sizes, initial=rows.offset + side * rows.side_bytes))
    parts = [packed[lo:hi] for lo, hi in pairwise(ends)]
    return [part.view(dtype).view(rows.rows, heads, -1) for part, dtype in zip(parts, dtypes, strict=True)]


def _blocks(layout: ChunkLayout, slots: Tensor, pool: Tensor) -> Iterator[tuple[LayerRows, list[tuple[slice, Index]]]]:
    """Each layer's rows as (place among the layer's rows, place in the pool); found once for layers with equal rows."""
    seen: dict[tuple[tuple[int, int], ...], list[tuple[slice, Index]]] = {}
    pages = max(1, BLOCK_VALUES // pool[0].numel() // PAGE_SIZES[0])
    step = pages * PAGE_SIZES[0] if slots.is_cpu else max(1, len(slots))
    for rows in layout.layers:
        if rows.ranges not in seen:
            picked = torch.cat([slots[lo:hi] for lo, hi in rows.ranges])
            parts = picked.split(step)
            starts = range(0, len(picked), step)
            seen[rows.ranges] = [
                (slice(at, at + len(part)), _places(part)) for at, part in zip(starts, parts, strict=True)
            ]
        yield rows, seen[rows.ranges]


def _places(slots: Tensor) -> Index:
    """Slots as the coarsest index of them; a device is not asked, since it would have to be waited for."""
    if not slots.is_cpu:
        return Pages(slots, 1)
    if bool((slots.diff() == 1).all()):
        return slice(int(slots[0]), int(slots[0]) + len(slots))
    for size in PAGE_SIZES:
        pages = slots.view(-1, size) if len(slots) % size == 0 else None
        if pages is not None and bool((pages[:, 0] % size == 0).all() and (pages.diff(dim=1) == 1).all()):
            return Pages(pages[:, 0] // size, size)
    return Pages(slots, 1)
