"""Requests that a decode worker waits for: where their rows go, how far they are, whether they may be written.

Where prefill has more attention ranks than decode, several of them send one rank of decode the rows of some KV heads
each: a room keeps how far each of them is, in each layer. The request is ready when each has sent its last chunk, which
comes after all of its other rows.

A room is closed before SGLang frees its pages, and a chunk is scattered under the room's lock only while it is open:
so no late chunk ever writes into pages that belong to another request.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import unpack
from pdtrim_deploy.plan import PDPlan
from pdtrim_sglang.layer_positions import LayerPositions
from pdtrim_sglang.pool import Destinations, PoolView, row_view
from pdtrim_sglang.protocol import ChunkHeader


@dataclass(frozen=True)
class AuxRows:
    """SGLang's metadata buffers: host address and bytes per request of each."""

    pointers: tuple[int, ...]
    item_bytes: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of one request's row across all buffers."""
        return sum(self.item_bytes)

    def views(self, index: int) -> list[memoryview]:
        """Writable views of one request's row."""
        return [row_view(at + index * size, size) for at, size in zip(self.pointers, self.item_bytes, strict=True)]

    def read(self, index: int) -> bytes:
        """One request's row."""
        return b"".join(self.views(index))

    def write(self, index: int, data: memoryview) -> None:
        """Overwrite one request's row."""
        for view in self.views(index):
            view[:], data = data[: len(view)], data[len(view) :]


def near(payload: Tensor, pool: PoolView) -> Tensor:
    """The payload where the pool is: on a GPU a copy, on its way over this thread's stream."""
    return payload if pool.keys[0].is_cpu else payload.to(pool.keys[0].device, non_blocking=True)


@dataclass
class DecodeRoom:
    """One request's destination: slots of all layers for tokens that prefill sends, and aux row `aux_index`.

    Full layers have the rows of the first `reused_tokens` tokens from an earlier request; the plan says from which
    token on that lets prefill send (`first_sent`).
    `places` are there, and may be written, when the device events in `ready` have come. `senders` are the KV heads, as
    the model counts them, that each rank of prefill sends; the first of them also sends the aux row. `positions` are
    the tokens up to which each that has sent some has sent each layer's. Of a model with linear attention `state_slot`
    is the request's in the pool of states, and `states` how many layers' have come.
    """

    room: int
    prompt_tokens: int
    reused_tokens: int
    places: Destinations
    aux_index: int
    ready: tuple[Any, ...] = ()
    senders: Mapping[int, range] = field(kw_only=True)
    state_slot: int | None = None
    positions: dict[int, LayerPositions] = field(init=False, default_factory=dict)
    states: int = field(init=False, default=0)
    open: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(
        self, plan: PDPlan, pool: PoolView, aux_rows: AuxRows, header: ChunkHeader, payload: Tensor, aux: memoryview
    ) -> str:
        """Scatter one chunk; returns why not, or nothing."""
        with self.lock:
            start = plan.first_sent(self.reused_tokens)
            positions = self.positions.get(header.rank) or LayerPositions(len(plan.kv), start)
            layers = 0 if pool.states is None else pool.states.layers
            if reason := self._refusal(header, positions, aux_rows.total_bytes, layers):
                return reason
            if header.states is not None:
                self._take_states(pool, header.states, payload)
                if header.last and self._brings_aux(header.rank):
                    aux_rows.write(self.aux_index, aux)
                return ""
            span = slice(header.start - start, header.stop - start)
            pool = pool.of_heads(header.heads)
            extent = header.prompt_tokens, header.start, header.stop, pool.kv_heads, header.layers
            layout = chunk_layout(plan, *extent, header.reused_tokens)
            pool.after(*self.ready)
            try:
                rows = near(payload, pool)
                slots = self.places.slots[:, span]
                unpack(layout, rows, pool.keys, pool.values, slots, pool.offsets, self.places.groups)
                if pool.draft is not None and layout.has_last:  # no layer is cut then, so there is one row of slots
                    pool.draft.unpack(layout, rows[layout.total_bytes :], slots[0])
            finally:  # also what failed half way writes no more when this returns, nor reads the payload
                pool.wait()
            positions.advance(header.layers or range(len(plan.kv)), header.stop)
            self.positions[header.rank] = positions
            if header.last and self._brings_aux(header.rank):
                aux_rows.write(self.aux_index, aux)
            return ""

    def _take_states(self, pool: PoolView, layers: range, payload: Tensor) -> None:
        assert pool.states is not None
        assert self.state_slot is not None
        pool.after(*self.ready)
        try:
            pool.states.unpack(layers, self.state_slot, near(payload, pool))
        finally:
            pool.wait()
        self.states = layers.stop

    def _brings_aux(self, rank: int) -> bool:
        return rank == next(iter(self.senders))

    def _refusal(self, header: ChunkHeader, positions: LayerPositions, aux_bytes: int, state_layers: int) -> str:
        """Why a chunk is not the next of its sender, whose rows came up to `positions`, or nothing.

        An aux row has `aux_bytes` bytes, and `state_layers` layers keep a state.
        """
        every = range(len(positions))
        layers = header.layers or every
        before = positions.runs(range(layers.start))  # rows of these come before a last chunk
        completes = header.stop == self.prompt_tokens and layers.stop == every.stop and not state_layers
        if header.states is not None:  # which come behind all rows
            before, completes = positions.runs(every), header.states.stop == state_layers
        rank, heads, aux = header.rank, self.senders.get(header.rank), 0
        if header.last and self._brings_aux(rank):
            aux = aux_bytes
        if not self.open:
            reason = "the request has ended on the decode side"
        elif header.prompt_tokens != self.prompt_tokens:
            reason = f"prefill says {header.prompt_tokens} prompt tokens, decode {self.prompt_tokens}"
        elif header.reused_tokens != self.reused_tokens:
            reason = f"prefill leaves out rows of {header.reused_tokens} tokens, decode has {self.reused_tokens}"
        elif heads is None:
            ranks = ", ".join(map(str, self.senders))
            reason = f"chunk of prefill rank {rank}; this rank of decode takes its KV from rank {ranks}"
        elif header.heads != heads:
            reason = (
                f"chunk of KV heads {header.heads.start} to {header.heads.stop - 1}; "
                f"prefill rank {rank} is to send {heads.start} to {heads.stop - 1}"
            )
        elif (runs := positions.runs(layers)) != [(layers, header.start)]:
            reason = f"chunk begins at token {header.start}, expected {_listed(runs)}"
        elif header.last != completes:
            reason = f"chunk ends at token {header.stop} of {self.prompt_tokens} and last={header.last}"
        elif (header.last or header.states) and any(at < self.prompt_tokens for _, at in before):
            reason = f"the last chunk came before rows of other layers, which are there up to token {_listed(before)}"
        elif header.aux_bytes != aux:
            reason = f"prefill rank {rank} sends an aux row of {header.aux_bytes} bytes, expected {aux}"
        else:
            reason = self._state_refusal(header.states) if header.states is not None else ""
        return reason

    def _state_refusal(self, layers: range) -> str:
        if layers.start != self.states:
            return f"states of layers {layers.start} to {layers.stop - 1}, expected {self.states}"
        return "decode has no slot for this request's states" if self.state_slot is None else ""

    def close(self) -> None:
        """Forbid further writes; waits for one that is under way."""
        with self.lock:
            self.open = False


def _listed(runs: Sequence[tuple[range, int]]) -> str:
    if len(runs) == 1:
        return str(runs[0][1])
    return ", ".join(f"{at} in layers {layers.start} to {layers.stop - 1}" for layers, at in runs)
