"""What the compiled library is told of a chunk: for every part of every layer its pool, slots and sections."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.cpu.library import library
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets, PartOffset, part_offset
from pdtrim_deploy.kvcache.layout import ChunkLayout
from pdtrim_deploy.kvcache.sections import native_name, section_offsets
from pdtrim_deploy.plan.wire import CODES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # places are rows.cpp's Dtype; CODES' are its Code
MAX_HEAD_DIM = 1024


class _Part(ctypes.Structure):
    """struct PdtrimPart."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pool", "slots", "codes", "scales", "mean", "table", "positions")),
        *((name, ctypes.c_int64) for name in ("stride", "pool_slots", "rows", "code")),
    )


class _Shape(ctypes.Structure):
    """struct PdtrimShape."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("dtype", "heads", "dim"))


def move(
    layout: ChunkLayout,
    packed: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    offsets: KeyOffsets | None = None,
    *,
    pack: bool,
) -> bool:
    """Pack (or unpack) a chunk as `pdtrim_deploy.kvcache.pack` says; False when it must be done by torch instead.

    Threads: as many as torch may use here, none for small chunks. The GIL is free meanwhile.

    Raises:
        IndexError: a slot lies outside its pool; nothing was moved.
        ValueError: as `pack`.

    """
    moved = [
        (rows, side, part, (keys, values)[side][rows.prefill_layer if pack else rows.decode_layer])
        for rows in layout.layers
        for side, parts in enumerate(rows.sides)
        for part in parts
    ]
    if not moved or not _fits(packed, [pool for *_, pool in moved]) or (compiled := library()) is None:
        return False
    first = moved[0][-1]
    _, heads, dim = first.shape
    native, item, slots = native_name(first), first.element_size(), slots.long().contiguous()
    picked: dict[tuple[tuple[int, int], ...], Tensor] = {}
    offset: list[PartOffset | None] = []  # keeps what `parts` points to
    parts, base = (_Part * len(moved))(), packed.data_ptr()
    for at, (rows, side, part, pool) in enumerate(moved):
        if (ranges := rows.ranges) not in picked:
            runs = [slots[lo:hi] for lo, hi in ranges]
            picked[ranges] = runs[0] if len(runs) == 1 else torch.cat(runs)
        starts = section_offsets(part, native, heads, dim)[:-1]
        sections = [base + start for start in starts] + [None] * (2 - len(starts))
        offset.append(part_offset(rows, side, part, pool, offsets))
        less = [None] * 3 if offset[-1] is None else [tensor.data_ptr() for tensor in offset[-1]]
        parts[at] = _Part(
            pool.data_ptr(), picked[ranges][part.first :].data_ptr(), *sections, *less,
            pool.stride(0) * item, len(pool), part.rows, CODES.index(part.code),
        )  # fmt: skip
    shape = _Shape(DTYPES.index(first.dtype), heads, dim)
    if compiled.pdtrim_move(parts, ctypes.c_int64(len(parts)), ctypes.byref(shape), torch.get_num_threads(), pack):
        raise IndexError(f"a slot of the prompt lies outside the pool of {len(first)} slots")
    return True


def _fits(packed: Tensor, pools: Sequence[Tensor]) -> bool:
    """Whether rows.cpp knows such tensors: plain ones on a CPU."""
    first = pools[0]
    _, heads, dim = first.shape
    plain = packed.is_cpu and packed.is_contiguous() and packed.data_ptr() % 4 == 0
    known = first.is_cpu and first.dtype in DTYPES and dim <= MAX_HEAD_DIM
    same = (first.dtype, heads, dim, (dim, 1))
    return plain and known and all((p.dtype, *p.shape[1:], p.stride()[1:]) == same for p in pools)
