"""Which rows an engine shall pack in a forward pass, where it puts them, and what of them a chunk sends.

A forward pass covers prompt tokens `[start, stop)` of each request of its batch: a *span*. SGLang's chunks need not
be spans: a prefix that was cached has none, and the tail of a page waits for the next chunk. So a chunk is cut where
spans begin and end, and each part is either sent from its span or gathered from the pool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.graph_io import packed_output, rows_input
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.kvcache.layout import ChunkLayout, LayerRows, chunk_layout
from pdtrim_deploy.kvcache.pack import pack
from pdtrim_deploy.plan import PDPlan
from pdtrim_sglang.by_request import ByRequest
from pdtrim_sglang.staging.arena import Arena, Block


@dataclass(frozen=True)
class Span:
    """Rows of prompt tokens `[layout.start, layout.stop)` of one request.

    Attributes:
        sides: K and V of each of `layout.layers`, `[2, rows, kv_heads, head_dim]` in the pool's dtype, in `block`.
        event: after which the rows may be read; None on the CPU.

    """

    layout: ChunkLayout
    sides: tuple[Tensor, ...]
    block: Block
    event: Any = None

    def payload(
        self, layout: ChunkLayout, out: Tensor, offsets: KeyOffsets | None = None, heads: slice | None = None
    ) -> list[memoryview] | None:
        """The packed bytes of a chunk inside the span; None when they are all in `out`.

        In host memory native rows are sent from the block itself, so that only codecs write to `out`. Of a range of
        the span's KV heads, `heads`, all rows are gathered; `layout` and `offsets` are then of that range.
        """
        if self.event is not None:
            self.event.synchronize()
        layers = [self._as_pool(rows) for rows in layout.layers]
        if heads is not None or not self.block.bytes.is_cpu:
            self._pack(layout, layers, out, offsets, heads or slice(None))
            return None
        pieces = _Pieces(self.block.bytes, out)
        for rows in layers:
            if rows.wire_dtype == "native":
                ((first, stop),) = rows.ranges
                for side in self.sides[rows.prefill_layer][:, first:stop]:
                    pieces.add(0, side.data_ptr() - self.block.bytes.data_ptr(), rows.bytes // 2)
            else:
                pieces.add(1, rows.offset, rows.bytes)
        self._pack(layout, [rows for rows in layers if rows.wire_dtype != "native"], out, offsets)
        return pieces.views()

    def _as_pool(self, rows: LayerRows) -> LayerRows:
        """A layer's rows of a chunk, as rows of the span instead of the pool."""
        place, token = self._places[rows.decode_layer], rows.positions[0][0]
        first = _rows_below(self.layout.layers[place], token - self.layout.start)
        return replace(rows, prefill_layer=place, ranges=((first, first + rows.rows),))

    def _pack(
        self,
        layout: ChunkLayout,
        layers: list[LayerRows],
        out: Tensor,
        offsets: KeyOffsets | None,
        heads: slice = slice(None),
    ) -> None:
        """Pack rows of the span: each layer's are a pool of their own, whose slots are their numbers."""
        if layers:
            keys, values = ([sides[side][:, heads] for sides in self.sides] for side in range(2))
            pack(replace(layout, layers=tuple(layers)), keys, values, self._slots, out, offsets)

    @cached_property
    def _places(self) -> dict[int, int]:
        """Number of a decode layer in `layout.layers`."""
        return {rows.decode_layer: place for place, rows in enumerate(self.layout.layers)}

    @property
    def _slots(self) -> Tensor:
        """Made for each chunk: its thread has a stream of its own, and a chunk goes to several ranks at once."""
        return torch.arange(max(sides.shape[1] for sides in self.sides), device=self.block.bytes.device)


def _rows_below(rows: LayerRows, token: int) -> int:
    """Rows of a layer that lie before a token of the chunk."""
    return sum(max(0, min(hi, token) - lo) for lo, hi in rows.ranges)


class _Pieces:
    """Byte ranges of some buffers, neighbours merged."""

    def __init__(self, *buffers: Tensor) -> None:
        self._buffers = [buffer.numpy().data for buffer in buffers]
        self._ranges: list[list[int]] = []

    def add(self, buffer: int, start: int, size: int) -> None:
        if self._ranges and self._ranges[-1][0] == buffer and self._ranges[-1][2] == start:
            self._ranges[-1][2] += size
        else:
            self._ranges.append([buffer, start, start + size])

    def views(self) -> list[memoryview]:
        return [self._buffers[buffer][start:stop] for buffer, start, stop in self._ranges]


@dataclass(frozen=True)
class _Expected:
    room: int
    prompt_tokens: int


@dataclass(frozen=True)
class StagedBatch:
    """What an engine is to pack in one forward pass: rows int64 by input name, their buffers by output name."""

    rows: dict[str, Tensor]
    packed: dict[str, Tensor]
    spans: tuple[tuple[int, Span], ...]


class Staging:
    """Spans of a prefill worker by room. Used by the scheduler's thread only; the arena's blocks by any."""

    def __init__(self, plan: PDPlan, kv_heads: int, dtype: torch.dtype, arena: Arena) -> None:
        self._plan, self._kv_heads, self._dtype, self._arena = plan, kv_heads, dtype, arena
        self._inputs = [rows_input(send) for send in plan.kv]
        self._expected = ByRequest[_Expected]()
        self._spans: dict[int, list[Span]] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes of the arena that some span, or a chunk on its way, holds."""
        return self._arena.used_bytes

    def expect(self, rid: str, room: int, prompt_tokens: int) -> None:
        """Request `rid` will be computed, and its KV sent to `room`."""
        self._expected.put(rid, room, _Expected(room, prompt_tokens))

    def forget(self, room: int) -> None:
        """Nothing more will be sent to `room`."""
        self._spans.pop(room, None)
        self._expected.forget(room)

    def batch(self, rids: Sequence[str], starts: Sequence[int], lengths: Sequence[int]) -> StagedBatch | None:
        """Rows and buffers of a forward pass over tokens `[start, start + length)` of each request, one after another.

        None when nobody waits for any of them, or the arena is full: the chunks are then gathered from the pool.
        """
        layouts: list[tuple[int, int, ChunkLayout]] = []  # room, first token within the batch, rows
        token = 0
        for rid, start, length in zip(rids, starts, lengths, strict=True):
            request = self._expected.get(rid)
            if request is not None and start + length <= request.prompt_tokens:
                layout = chunk_layout(self._plan, request.prompt_tokens, start, start + length, self._kv_heads)
                layouts.append((request.room, token, layout))
            token += length
        rows = self._rows(layouts)
        shapes = [(2, len(rows.get(name, ())), self._kv_heads, self._plan.model.head_dim) for name in self._inputs]
        sizes = [math.prod(shape) * self._dtype.itemsize for shape in shapes]
        *starts_at, total = self._arena.starts(sizes)
        block = self._arena.take(total) if total else None
        if block is None:
            return None
        parts = zip(starts_at, sizes, shapes, strict=True)
        packed = [block.bytes[at : at + size].view(self._dtype).view(shape) for at, size, shape in parts]
        first = [0] * len(packed)  # row of each layer's buffer at which the next request begins
        spans = []
        for room, _, layout in layouts:
            sides = []
            for part in layout.layers:
                at = first[part.decode_layer]
                sides.append(packed[part.decode_layer][:, at : at + part.rows])
                first[part.decode_layer] = at + part.rows
            spans.append((room, Span(layout, tuple(sides), block)))
        outputs = {packed_output(layer): buffer for layer, buffer in enumerate(packed)}
        return StagedBatch(rows, outputs, tuple(spans))

    def commit(self, batch: StagedBatch, event: Any = None) -> None:
        """The engine has filled the buffers of `batch` (once `event` has come)."""
        for room, span in batch.spans:
            if self._expected.of_room(room) is not None:
                older = (s for s in self._spans.get(room, ()) if s.layout.stop <= span.layout.start)
                done = span if event is None else Span(span.layout, span.sides, span.block, event)
                self._spans[room] = [*older, done]

    def cut(self, room: int, start: int, stop: int) -> list[tuple[int, int, Span | None]]:
        """Parts of the next chunk `[start, stop)`, in order, each inside one span or in none; spans end as they go."""
        spans, at = self._spans.get(room, []), start
        parts: list[tuple[int, int, Span | None]] = []
        for span in spans:
            begin, end = max(at, span.layout.start), min(stop, span.layout.stop)
            if begin < end:
                if at < begin:
                    parts.append((at, begin, None))
                parts.append((begin, end, span))
                at = end
        if at < stop or not parts:
            parts.append((at, stop, None))
        if spans:
            self._spans[room] = [span for span in spans if span.layout.stop > stop]
        return parts

    def _rows(self, layouts: Sequence[tuple[int, int, ChunkLayout]]) -> dict[str, Tensor]:
        """Rows of the batch by input; every layer of a rule has the same, so its first layer tells."""
        runs: dict[str, list[Tensor]] = {}
        for _, token, layout in layouts:
            seen = set()
            for part in layout.layers:
                name = self._inputs[part.decode_layer]
                if name not in seen:
                    seen.add(name)
                    runs.setdefault(name, []).extend(torch.arange(token + lo, token + hi) for lo, hi in part.ranges)
        return {name: torch.cat(parts) for name, parts in runs.items()}
