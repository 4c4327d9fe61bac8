"""What the compiled library is told of a chunk: for every side of every layer its pool, slots and sections."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.cpu.library import library
from pdtrim_deploy.kvcache.layout import ChunkLayout
from pdtrim_deploy.kvcache.sections import native_name, section_offsets
from pdtrim_deploy.wire import WIRE_DTYPES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # places are rows.cpp's Dtype; WIRE_DTYPES' are its Wire
MAX_HEAD_DIM = 1024


class _Side(ctypes.Structure):
    """struct PdtrimSide."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pool", "slots", "codes", "scales")),
        *((name, ctypes.c_int64) for name in ("stride", "pool_slots", "rows", "wire")),
    )


class _Shape(ctypes.Structure):
    """struct PdtrimShape."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("dtype", "heads", "dim"))


def move(
    layout: ChunkLayout, packed: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], slots: Tensor, pack: bool
) -> bool:
    """Pack (or unpack) a chunk as `pdtrim_deploy.kvcache.pack` says; False when it must be done by torch instead.

    Threads: as many as torch may use here, none for small chunks. The GIL is free meanwhile.

    Raises:
        IndexError: a slot lies outside its pool; nothing was moved.

    """
    pools = [
        side[rows.prefill_layer if pack else rows.decode_layer] for rows in layout.layers for side in (keys, values)
    ]
    if not pools or not _fits(packed, pools) or (compiled := library()) is None:
        return False
    _, heads, dim = pools[0].shape
    native, item, slots = native_name(pools[0]), pools[0].element_size(), slots.long().contiguous()
    picked: dict[tuple[tuple[int, int], ...], Tensor] = {}
    sides, base = (_Side * len(pools))(), packed.data_ptr()
    for at, pool in enumerate(pools):
        rows, side = layout.layers[at // 2], at % 2
        if rows.ranges not in picked:
            parts = [slots[lo:hi] for lo, hi in rows.ranges]
            picked[rows.ranges] = parts[0] if len(parts) == 1 else torch.cat(parts)
        offsets = section_offsets(rows, side, native, heads, dim)[:-1]
        sections = [base + offset for offset in offsets] + [None] * (2 - len(offsets))
        sides[at] = _Side(
            pool.data_ptr(), picked[rows.ranges].data_ptr(), *sections,
            pool.stride(0) * item, len(pool), rows.rows, WIRE_DTYPES.index(rows.wire_dtype),
        )  # fmt: skip
    shape = _Shape(DTYPES.index(pools[0].dtype), heads, dim)
    if compiled.pdtrim_move(sides, ctypes.c_int64(len(sides)), ctypes.byref(shape), torch.get_num_threads(), pack):
        raise IndexError(f"a slot of the prompt lies outside the pool of {len(pools[0])} slots")
    return True


def _fits(packed: Tensor, pools: Sequence[Tensor]) -> bool:
    """Whether rows.cpp knows such tensors: plain ones on a CPU."""
    first = pools[0]
    _, heads, dim = first.shape
    plain = packed.is_cpu and packed.is_contiguous() and packed.data_ptr() % 4 == 0
    known = first.is_cpu and first.dtype in DTYPES and dim <= MAX_HEAD_DIM
    same = (first.dtype, heads, dim, (dim, 1))
    return plain and known and all((p.dtype, *p.shape[1:], p.stride()[1:]) == same for p in pools)
