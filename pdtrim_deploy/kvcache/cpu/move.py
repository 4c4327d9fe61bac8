"""Give a chunk's table to the compiled library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.cpu.library import library
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.kvcache.layout import ChunkLayout
from pdtrim_deploy.kvcache.table import DTYPES, Groups, chunk_tables, dense_slots


class _Chunk(ctypes.Structure):
    """struct PdtrimChunk."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("slots", "packed", "turns")),
        *((name, ctypes.c_int32) for name in ("dtype", "heads", "dim")),
        ("group_stride", ctypes.c_int64),
    )


def move(
    layout: ChunkLayout,
    packed: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    offsets: KeyOffsets | None = None,
    groups: Groups | None = None,
    *,
    pack: bool,
) -> bool:
    """Pack (or unpack) a chunk as `pdtrim_deploy.kvcache.pack` says; False when it must be done by torch instead.

    Threads: as many as torch may use here, none for small chunks. The GIL is free meanwhile.

    Raises:
        IndexError: a slot lies outside its pool; nothing was moved.
        ValueError: as `pack`.

    """
    plain = packed.is_cpu and packed.is_contiguous() and packed.data_ptr() % 4 == 0
    if not plain or not slots.is_cpu or not keys[0].is_cpu:
        return False
    tables = chunk_tables(layout, keys, values, offsets, groups, pack=pack)
    if not tables or (compiled := library()) is None:
        return False
    slots, group_stride = dense_slots(slots)
    for table in tables:
        turns = offsets.table(table.turned) if offsets is not None and table.turned else None
        chunk = _Chunk(
            slots.data_ptr(), packed.data_ptr(), None if turns is None else turns.data_ptr(),
            DTYPES.index(table.dtype), table.heads, table.head_dim, group_stride,
        )  # fmt: skip
        runs, count = ctypes.c_void_p(table.runs.data_ptr()), ctypes.c_int64(len(table.runs))
        if compiled.pdtrim_move(runs, count, ctypes.byref(chunk), torch.get_num_threads(), pack):
            raise IndexError(f"a slot of the prompt lies outside the pool of {len(keys[0])} slots")
    return True
