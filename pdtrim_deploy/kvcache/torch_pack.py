"""`pack` and `unpack` in torch's own operations, on any device: what every compiled form is held to, bit for bit.

Rows go in blocks small enough for a CPU's cache, so that a codec's steps touch memory once; a block whose slots are
a run is read and written in place, any other by one gather or scatter of the largest pages that its slots make.
On other devices a layer's side is one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.codecs import get_codec
from pdtrim_deploy.kvcache.codecs.base import Index, Less, Pages, put
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.kvcache.layout import ChunkLayout, LayerRows, Part
from pdtrim_deploy.kvcache.part_offset import part_offset
from pdtrim_deploy.kvcache.sections import part_sections
from pdtrim_deploy.kvcache.table import Groups

BLOCK_VALUES = 1 << 17  # half a megabyte in float32
PAGE_SIZES = (64, 16, 4)  # of slots that come in whole pages; a pool with pages of 32 has whole ones of 16


def pack(
    layout: ChunkLayout,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    out: Tensor | None = None,
    offsets: KeyOffsets | None = None,
    groups: Groups | None = None,
) -> Tensor:
    """As `pdtrim_deploy.kvcache.pack.pack`."""
    if out is None:
        out = torch.empty(layout.total_bytes, dtype=torch.uint8, device=slots.device)
    out = out[: layout.total_bytes]
    of_rows = [0 if groups is None else groups[rows.prefill_layer] for rows in layout.layers]
    for rows, side, part, blocks in _blocks(layout, slots, of_rows, keys[0]):
        pool, codec = (keys, values)[side][rows.prefill_layer], get_codec(part.code)
        sections = part_sections(out, part, pool)
        less = part_offset(rows, side, part, pool, offsets)
        for at, index in blocks:
            constants = Less(less.rows(at), less.constants.scale) if less else None
            codec.encode(pool, index, [section[at] for section in sections], constants)
    return out


def unpack(
    layout: ChunkLayout,
    packed: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    offsets: KeyOffsets | None = None,
    groups: Groups | None = None,
) -> None:
    """As `pdtrim_deploy.kvcache.pack.unpack`."""
    of_rows = [0 if groups is None else groups[rows.decode_layer] for rows in layout.layers]
    for rows, side, part, blocks in _blocks(layout, slots, of_rows, keys[0]):
        pool, codec = (keys, values)[side][rows.decode_layer], get_codec(part.code)
        sections = part_sections(packed, part, pool)
        less = part_offset(rows, side, part, pool, offsets)
        for at, index in blocks:
            decoded = codec.decode([section[at] for section in sections])
            put(pool, index, decoded.mul_(less.constants.inverse).add_(less.rows(at)) if less else decoded)


Blocks = list[tuple[slice, Index]]  # place among a part's rows, place in the pool


def _blocks(
    layout: ChunkLayout, slots: Tensor, groups: Sequence[int], pool: Tensor
) -> Iterator[tuple[LayerRows, int, Part, Blocks]]:
    """Each part of each side of each layer, with its blocks; found once for those with equal rows and slots.

    `groups` are the rows of `slots` of the layout's layers.
    """
    seen: dict[tuple[int, tuple[tuple[int, int], ...], int, int], Blocks] = {}
    pages = max(1, BLOCK_VALUES // pool[0].numel() // PAGE_SIZES[0])
    step = pages * PAGE_SIZES[0] if slots.is_cpu else max(1, slots.shape[-1])
    for rows, group in zip(layout.layers, groups, strict=True):
        of_group = slots[group] if slots.dim() > 1 else slots
        for side, parts in enumerate(rows.sides):
            for part in parts:
                key = (group, rows.ranges, part.first, part.rows)
                if key not in seen:
                    picked = torch.cat([of_group[lo:hi] for lo, hi in rows.ranges])[part.first :][: part.rows]
                    starts = range(0, len(picked), step)
                    pieces = zip(starts, picked.split(step), strict=True)
                    sizes = PAGE_SIZES if pool.is_contiguous() else ()
                    seen[key] = [(slice(at, at + len(piece)), _places(piece, sizes)) for at, piece in pieces]
                yield rows, side, part, seen[key]


def _places(slots: Tensor, sizes: Sequence[int] = PAGE_SIZES) -> Index:
    """Slots as the coarsest index of them; a device is not asked, since it would have to be waited for.

    `sizes`: of pages that may be moved as one; none of a range of a pool's heads, which has gaps between its slots.
    """
    if not slots.is_cpu:
        return Pages(slots, 1)
    if bool((slots.diff() == 1).all()):
        return slice(int(slots[0]), int(slots[0]) + len(slots))
    for size in sizes:
        pages = slots.view(-1, size) if len(slots) % size == 0 else None
        if pages is not None and bool((pages[:, 0] % size == 0).all() and (pages.diff(dim=1) == 1).all()):
            return Pages(pages[:, 0] // size, size)
    return Pages(slots, 1)
