"""Move KV between a paged pool and the packed bytes of a `ChunkLayout`, through the codecs of its wire dtypes.

One meaning, several forms with the same bytes: on a CPU a compiled one (`cpu/`), one pass over memory; torch's own
operations (`torch_pack`) elsewhere, and where there is no compiler. `triton_pack` is not used by default. Bytes that
travel are host memory: rows of a pool on a GPU are packed there, and cross as one copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_deploy.kvcache import torch_pack
from pdtrim_deploy.kvcache.cpu import move
from pdtrim_deploy.kvcache.cpu.library import library
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.kvcache.layout import ChunkLayout


def pack(
    layout: ChunkLayout,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    out: Tensor | None = None,
    offsets: KeyOffsets | None = None,
) -> Tensor:
    """Gather, quantise and pack a chunk's rows from the prefill pool.

    Args:
        keys, values: one pool tensor per *prefill* layer, `[pool_slots, kv_heads, head_dim]`, native dtype.
        slots: int64 `[stop - start]`, the pool slot of each token of the chunk.
        out: uint8 staging buffer of at least `layout.total_bytes`, aligned to 4 bytes, on the pool's device or the
            host; made on the pool's device when left out.
        offsets: the plan's key offsets, of the pool's KV heads; None when the plan has none.

    Returns:
        uint8 `[layout.total_bytes]`, a view of `out` when it was given. In host memory the bytes are there.

    Raises:
        IndexError: a slot lies outside its pool.
        ValueError: a layer's keys travel less an offset, and `offsets` has none.

    """
    offsets = None if offsets is None else offsets.to(slots.device)
    if out is None:
        out = torch.empty(layout.total_bytes, dtype=torch.uint8, device=slots.device)
    out = out[: layout.total_bytes]
    if out.device != slots.device:
        return out.copy_(pack(layout, keys, values, slots, offsets=offsets))
    if not move.move(layout, out, keys, values, slots, offsets, pack=True):
        torch_pack.pack(layout, keys, values, slots, out, offsets)
    return out


def unpack(
    layout: ChunkLayout,
    packed: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    offsets: KeyOffsets | None = None,
) -> None:
    """Scatter packed bytes into the decode pool; rows that were not sent are left untouched.

    Args:
        packed: uint8, `layout.total_bytes` long, as `pack` made it, aligned to 4 bytes; in host memory or on the
            pool's device, whose current stream then writes the rows.
        keys, values: one pool tensor per *decode* layer, `[pool_slots, kv_heads, head_dim]`.
        slots: int64 `[stop - start]`, the pool slot of each token of the chunk.
        offsets: as of `pack`.

    Raises:
        IndexError: a slot lies outside its pool.
        ValueError: a layer's keys travel less an offset, and `offsets` has none.

    """
    offsets = None if offsets is None else offsets.to(slots.device)
    packed = packed.to(slots.device)
    if not move.move(layout, packed, keys, values, slots, offsets, pack=False):
        torch_pack.unpack(layout, packed, keys, values, slots, offsets)


def prepare() -> None:
    """Compile and load now what the first `pack` would wait for: seconds, once a machine."""
    library()
