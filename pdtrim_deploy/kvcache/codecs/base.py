"""What a code of the wire is to the packer: rows in, sections out, and back. One pass each, no loop over rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.pool_rows import to_rows

MAX_SCALE = 65504.0  # float16's largest


class Pages(NamedTuple):
    """Rows of a pool as whole pages of `size` rows: `numbers` int64, page `n` is rows `[n * size, (n + 1) * size)`."""

    numbers: Tensor
    size: int


Index = slice | Pages  # which rows of a pool: one run, or pages (of one row, at the least) in any order


class Less(NamedTuple):
    """Rows travel as `(row - offset) * scale`: float32, of the rows' shape and `[kv_heads, head_dim]`."""

    offset: Tensor
    scale: Tensor


class Codec(Protocol):
    """A code.

    `sections` are views of the packed bytes, `[rows, kv_heads, per_head]`, as `plan.wire.row_sections` lists
    them. A head of a row that holds NaN or infinity comes back without a single number that looks right: quantised, its
    scales are float16's NaN 0x7e00 and its codes 0.
    """

    def encode(self, pool: Tensor, index: Index, sections: Sequence[Tensor], less: Less | None = None) -> None:
        """Gather rows of `pool`, `[slots, kv_heads, head_dim]`, and write them into `sections`.

        Args:
            less: what is done to rows first; never given for rows that travel native.

        """

    def decode(self, sections: Sequence[Tensor]) -> Tensor:
        """The rows again, `[rows, kv_heads, head_dim]`: float32, or the pool's dtype when they travelled in it."""


def take(pool: Tensor, index: Index, out: Tensor | None = None) -> Tensor:
    """Rows of a pool: a view for a run, else a gather; written to `out` when given."""
    if isinstance(index, slice):
        run = _run(pool, index)
        return run if out is None else out.copy_(run)
    if out is None:
        out = pool.new_empty(len(index.numbers) * index.size, *pool.shape[1:])
    target, source = _pages(index.size, out, pool)
    torch.index_select(source, 0, index.numbers, out=target)
    return out


def values(pool: Tensor, index: Index, less: Less | None) -> Tensor:
    """Rows of a pool as float32 of their own, as `less` says when given."""
    rows = take(pool, index).to(torch.float32, copy=True)
    return rows if less is None else rows.sub_(less.offset).mul_(less.scale)


def put(pool: Tensor, index: Index, rows: Tensor) -> None:
    """Write rows into a pool, in its dtype."""
    if isinstance(index, slice):
        _run(pool, index).copy_(to_rows(rows, pool.dtype))
    else:
        target, source = _pages(index.size, pool, to_rows(rows, pool.dtype))
        target.index_copy_(0, index.numbers, source)


def _run(pool: Tensor, index: slice) -> Tensor:
    """A view of a run of slots; IndexError where a slice would leave out those outside the pool."""
    if not 0 <= index.start < index.stop <= len(pool):
        raise IndexError(f"a slot of the prompt lies outside the pool of {len(pool)} slots")
    return pool[index]


def _pages(size: int, target: Tensor, source: Tensor) -> list[Tensor]:
    """The same bytes as `[pages, words]`, words of the widest integer that fits: torch moves them item by item.

    RuntimeError where pages of `target` have gaps, as of a range of a pool's heads: only pages of one row are views
    there. Of such a `source` they are a copy.
    """
    shape = (-1, size * target[0].numel())
    whole = (tensor[: len(tensor) // size * size] for tensor in (target, source))
    flat = [next(whole).view(shape), next(whole).reshape(shape)]
    words = (torch.int64, torch.int32, torch.int16, torch.uint8)
    word = next(w for w in words if all(_whole_words(t, w) for t in flat))
    return [t.view(word) for t in flat]


def _whole_words(flat: Tensor, word: torch.dtype) -> bool:
    """Whether rows, and where they begin, are such words."""
    places = (flat.shape[1], flat.stride(0), flat.storage_offset())
    return all(flat.element_size() * n % word.itemsize == 0 for n in places)


def quantise(rows: Tensor, steps: float, scale: Tensor) -> Tensor:
    """Float32 `rows`, `[rows, kv_heads, head_dim]`, in units of a symmetric scale that brings the largest to `steps`.

    Writes `float16(min(largest * (1 / steps), 65504))` to `scale`, `[rows, kv_heads, 1]`. Returns `rows`, changed in
    place: times the inverse of what was written (0 for a scale of 0), clamped to +-`steps`. A head that is not finite
    has scale NaN (0x7e00) and zeros.
    """
    largest = torch.maximum(rows.amax(-1, keepdim=True), rows.amin(-1, keepdim=True).neg_()).abs_()  # no -0
    broken = ~torch.isfinite(largest)
    scale.copy_((largest * (1 / steps)).clamp_(max=MAX_SCALE)).masked_fill_(broken, torch.nan)
    inverse = scale.float().reciprocal_().masked_fill_(scale == 0, 0)
    return rows.mul_(inverse).clamp_(-steps, steps).masked_fill_(broken, 0)
