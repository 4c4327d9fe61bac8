"""Tables say what moves a chunk; the compiled CPU form and the Triton form each execute one in one call.

A row of the table is a *run*: rows of one side (K or V) of one layer, in one code, whose tokens follow one another. Its
fields are int64, in the order of `FIELDS`:

    pool         address of slot 0, at the first KV head that moves
    mean         address of the key offset's `KeyConstants.values`, whose mean is first; 0 where rows travel whole
    stride       bytes between slots
    pool_slots   number of slots
    group        row of the chunk's slots that its layer has; 0 where all layers have the same
    token        the first row's place in that row
    position     the first row's absolute prompt position
    rows         number of rows
    code         place in `plan.wire.CODES`
    codes        byte of the packed chunk where the first row's codes (or native values) lie
    scales       the same of its scales; native rows have none

A chunk has one table, or two where K and V differ in shape: a latent and its rope key are views of one tensor.

A range of the pool's KV heads is a view, `pool[:, first:stop]`: its address and its number of heads say all. Addresses
are those of the pools' device, so a table is made once for a layout and its pools, and is good as long as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.kvcache.layout import ChunkLayout, Part
from pdtrim_deploy.kvcache.part_offset import part_constants
from pdtrim_deploy.kvcache.sections import native_name, section_offsets
from pdtrim_deploy.plan.wire import CODES, Code

FIELDS = ("pool", "mean", "stride", "pool_slots", "group", "token", "position", "rows", "code", "codes", "scales")
# Places are rows.cpp's Dtype, and the kernels'.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
MAX_HEAD_DIM = 1024
MAX_TABLES = 256

Spans = tuple[tuple[int, int], ...]  # half-open ranges, ascending
Groups = tuple[int, ...]  # by layer, its row of slots


class Pool(NamedTuple):
    """What a table holds of one pool tensor `[slots, kv_heads, head_dim]`."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Table:
    """Runs of a chunk, int64 `[runs, len(FIELDS)]` in host memory, and what all of their pools have in common."""

    runs: Tensor
    heads: int
    head_dim: int
    dtype: torch.dtype
    codes: frozenset[Code]
    turned: int  # prompt positions of rows that travel less an offset lie below it; 0 when there are none

    def column(self, field: str) -> list[int]:
        """A field of all runs."""
        values: list[int] = self.runs[:, FIELDS.index(field)].tolist()
        return values


def chunk_tables(
    layout: ChunkLayout,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    offsets: KeyOffsets | None = None,
    groups: Groups | None = None,
    *,
    pack: bool,
) -> tuple[Table, ...]:
    """The tables of a chunk that is packed from, or unpacked into, these pools; empty where only torch can do it.

    `groups` as of `pdtrim_deploy.kvcache.pack`.

    Raises:
        ValueError: a layer's keys travel less an offset, and `offsets` has none.

    """
    layers = [rows.prefill_layer if pack else rows.decode_layer for rows in layout.layers]
    pools = tuple(
        Pool(pool.data_ptr(), pool.shape, pool.stride(), pool.dtype)
        for layer in layers
        for pool in (side[layer] for side in (keys, values))
    )
    of_rows = None if groups is None else tuple(groups[layer] for layer in layers)
    return _tables(layout, pools, of_rows, offsets)


@lru_cache(maxsize=MAX_TABLES)
def _tables(
    layout: ChunkLayout, pools: tuple[Pool, ...], groups: Groups | None, offsets: KeyOffsets | None
) -> tuple[Table, ...]:
    """`groups`: of each of the layout's layers."""
    if not pools or not _fits(pools):
        return ()
    shapes = dict.fromkeys(pool.shape[1:] for pool in pools)
    return tuple(_table(layout, pools, vectors, groups, offsets) for vectors in shapes)


def _table(
    layout: ChunkLayout,
    pools: tuple[Pool, ...],
    vectors: tuple[int, ...],
    groups: Groups | None,
    offsets: KeyOffsets | None,
) -> Table:
    """Of the pools whose slots are `vectors`, heads and their size."""
    heads, head_dim = vectors
    native, runs, codes, turned = native_name(pools[0].dtype), [], set[Code](), 0
    for place, (rows, side) in enumerate((rows, side) for rows in layout.layers for side in range(2)):
        pool, group = pools[place], 0 if groups is None else groups[place // 2]
        for part in rows.sides[side] if pool.shape[1:] == vectors else ():
            constants = part_constants(rows, side, part, (heads, head_dim), offsets)
            mean = 0 if constants is None else constants.values.data_ptr()
            starts = section_offsets(part, native, heads, head_dim)
            per_row = [(hi - lo) // part.rows for lo, hi in pairwise(starts)]
            codes.add(part.code)
            turned = turned if constants is None else max(turned, rows.positions[-1][1])
            for row, token, position, count in part_runs(rows.ranges, rows.positions, part):
                packed = [start + row * size for start, size in zip(starts, per_row, strict=False)]
                runs.append(
                    (
                        pool.address, mean, pool.stride[0] * pool.dtype.itemsize, pool.shape[0], group,
                        token, position, count, CODES.index(part.code), packed[0], packed[-1],
                    )
                )  # fmt: skip
    return Table(torch.tensor(runs), heads, head_dim, pools[0].dtype, frozenset(codes), turned)


def dense_slots(slots: Tensor) -> tuple[Tensor, int]:
    """Slots as int64 whose tokens follow one another, and the distance between its rows, where it has some.

    A chunk's part of a prompt's slots is one already: nothing is copied then.
    """
    if slots.dtype != torch.int64 or slots.stride(-1) != 1:
        slots = slots.long().contiguous()
    return slots, slots.stride(0) if slots.dim() > 1 else 0


def part_runs(ranges: Spans, positions: Spans, part: Part) -> list[tuple[int, int, int, int]]:
    """Runs of a part's rows: first row (of the part), its token, its prompt position, number of rows."""
    first, stop = part.first, part.first + part.rows
    cuts = {first, stop, *(row for spans in (ranges, positions) for row in accumulate(hi - lo for lo, hi in spans))}
    return [
        (lo - first, _at(ranges, lo), _at(positions, lo), hi - lo)
        for lo, hi in pairwise(sorted(cut for cut in cuts if first <= cut <= stop))
    ]


def _at(spans: Spans, row: int) -> int:
    """What row `row` of the concatenated spans is."""
    for lo, hi in spans:
        if row < hi - lo:
            return lo + row
        row -= hi - lo
    raise IndexError(f"row {row} lies behind the spans {spans}")


def _fits(pools: Sequence[Pool]) -> bool:
    """Whether the compiled forms know such pools: of one dtype, K's of one shape and V's, heads without gaps."""
    known = pools[0].dtype in DTYPES and all(pool.shape[2] <= MAX_HEAD_DIM for pool in pools)
    shapes = [pool.shape[1:] for pool in pools]
    dense = all(pool.stride[1:] == (pool.shape[2], 1) and pool.dtype == pools[0].dtype for pool in pools)
    return known and dense and len(set(shapes[::2])) == len(set(shapes[1::2])) == 1
