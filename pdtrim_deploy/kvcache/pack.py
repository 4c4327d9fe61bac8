"""Move KV between a paged pool and the packed bytes of a `ChunkLayout`: one gather, one scatter, no copy between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.layout import ChunkLayout, LayerRows


def pack(
    layout: ChunkLayout,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """Gather a chunk's rows from the prefill pool.

    Args:
        keys, values: one pool tensor per *prefill* layer, `[pool_slots, kv_heads, head_dim]`, native dtype.
        slots: int64 `[stop - start]`, the pool slot of each token of the chunk.
        out: uint8 staging buffer of at least `layout.total_bytes`; made when left out.

    Returns:
        uint8 `[layout.total_bytes]`, a view of `out` when it was given.

    """
    if out is None:
        out = torch.empty(layout.total_bytes, dtype=torch.uint8, device=slots.device)
    out = out[: layout.total_bytes]
    for rows, picked in _picked(layout, slots):
        for side, pool in enumerate((keys[rows.prefill_layer], values[rows.prefill_layer])):
            torch.index_select(pool.flatten(1), 0, picked, out=_side(out, rows, side, pool))
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
        packed: uint8, `layout.total_bytes` long, as `pack` made it.
        keys, values: one pool tensor per *decode* layer, `[pool_slots, kv_heads, head_dim]`.
        slots: int64 `[stop - start]`, the pool slot of each token of the chunk.

    """
    for rows, picked in _picked(layout, slots):
        for side, pool in enumerate((keys[rows.decode_layer], values[rows.decode_layer])):
            pool.flatten(1).index_copy_(0, picked, _side(packed, rows, side, pool))


def _picked(layout: ChunkLayout, slots: Tensor) -> Iterator[tuple[LayerRows, Tensor]]:
    """Each layer's rows with their pool slots; layers that send the same rows share one index tensor."""
    seen: dict[tuple[tuple[int, int], ...], Tensor] = {}
    for rows in layout.layers:
        if rows.ranges not in seen:
            parts = [slots[lo:hi] for lo, hi in rows.ranges]
            seen[rows.ranges] = parts[0] if len(parts) == 1 else torch.cat(parts)
        yield rows, seen[rows.ranges]


def _side(packed: Tensor, rows: LayerRows, side: int, pool: Tensor) -> Tensor:
    begin = rows.offset + side * rows.side_bytes
    return packed[begin : begin + rows.side_bytes].view(pool.dtype).view(rows.rows, -1)
