"""A chunk's rows, packed into a staging slot: from the pool's pages, or from where an engine has packed them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.checksum import checksum
from pdtrim_deploy.kvcache.gpu import faults
from pdtrim_deploy.kvcache.layout import ChunkLayout, chunk_layout
from pdtrim_deploy.kvcache.pack import pack
from pdtrim_deploy.plan import PDPlan
from pdtrim_sglang.forward_pass import ForwardPass
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.request_pages import MovingPages
from pdtrim_sglang.rooms import AuxRows
from pdtrim_sglang.staging import Span
from pdtrim_sglang.transports.base import staging_buffer


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens `[start, stop)` of a request.

    Attributes:
        pages: int32, of this worker's pool; the first one begins with token `pages_start`.
        moving: they instead, where SGLang may exchange them until they are read.
        events: device events after which `pages`, and the pages, may be read.
        span: where an engine has packed the rows already.
        heads: the KV heads to send, as the model counts them; all of this rank's when left out.
        layers: the KV layers of decode whose rows to send; all when left out.
        forward_pass: the pass that computes them, where they may leave before it has ended.
        reused_tokens: of the prompt's first tokens, decode's full layers have the rows of so many.
        states: of the layers with linear attention so many, whose states to send and no rows: those in `state_slot`.
        carries_aux: whether the last chunk brings the request's aux row: of several senders the first one's does.

    """

    room: int
    pages: Any
    pages_start: int
    prompt_tokens: int
    start: int
    stop: int
    last: bool
    aux_index: int
    events: tuple[Any, ...] = ()
    span: Span | None = None
    heads: range | None = None
    layers: range | None = None
    forward_pass: ForwardPass | None = None
    reused_tokens: int = 0
    moving: MovingPages | None = None
    carries_aux: bool = True
    states: range | None = None
    state_slot: int | None = None


@dataclass(frozen=True)
class Packed:
    """A chunk whose bytes lie in slot number `slot`, or in `pieces` of it and of other memory, once `event` has come.

    They are of KV heads `heads`; `fault` is the flag of its slot, where they are on a GPU.
    `queued_at` is when the scheduler queued it, in seconds of the monotonic clock.
    `device_sum` is the checksum of bytes in a slot on a GPU, int64 `[1]` on the host; it is there with `event`, too.
    `draft_bytes` are those of a draft model's rows, which stand behind the others, `state_bytes` those of states, which
    stand alone.
    """

    queued_at: float
    chunk: Chunk
    layout: ChunkLayout
    heads: range
    slot: int
    pieces: Sequence[memoryview] | None
    aux: bytes
    event: Any
    fault: Tensor | None
    device_sum: Tensor | None = None
    draft_bytes: int = 0
    state_bytes: int = 0

    @property
    def payload_bytes(self) -> int:
        """Of all rows, or of states."""
        return self.layout.total_bytes + self.draft_bytes + self.state_bytes

    def wait(self) -> None:
        """Until the bytes are there. IndexError: a slot lay outside its pool."""
        if self.event is not None:
            self.event.synchronize()
        if self.fault is not None:
            faults.check(self.fault)


class Packer:
    """Packs chunks of one pool into `slots`, uint8 on the host or the pool's GPU; used by one thread, there its stream.

    Into a slot on a GPU rows come from the pool, also where an engine has packed them.
    """

    def __init__(self, plan: PDPlan, pool: PoolView, aux: AuxRows, slots: Sequence[Tensor]) -> None:
        self._plan, self._pool, self._aux, self._slots = plan, pool, aux, slots
        self._device = device = pool.keys[0].device
        self._faults = [faults.new_flag(device) if device.type == "cuda" else None for _ in slots]
        self._sums = [None if slot.is_cpu else staging_buffer(8).view(torch.int64) for slot in slots]

    def pack(self, queued_at: float, chunk: Chunk, slot: int) -> Packed:
        """Pack a chunk whose room is live; a GPU may still be at it when this returns."""
        for event in chunk.events:
            event.synchronize()
        if chunk.states is not None or (moving := chunk.moving) is None:
            return self._pack_or_settle(queued_at, chunk, slot, chunk.pages)
        with moving.request.reading() as readers:
            self._pool.after(moving.known)
            packed = self._pack_or_settle(queued_at, chunk, slot, moving.pages)
            if packed.event is not None:
                readers.append(packed.event)
            return packed

    def _pack_or_settle(self, queued_at: float, chunk: Chunk, slot: int, pages: Any) -> Packed:
        """Pack; where it raises, the GPU reads no page and writes no slot any more."""
        if (fault := self._faults[slot]) is not None:
            fault.zero_()  # of a chunk that was not packed to its end
            faults.use(self._device, fault)
        try:
            if chunk.states is not None:
                return self._pack_states(queued_at, chunk, slot, chunk.states)
            return self._pack(queued_at, chunk, slot, pages)
        except Exception:
            if (event := self._pool.record_event()) is not None:
                event.synchronize()
            raise

    def _aux_row(self, chunk: Chunk) -> bytes:
        return self._aux.read(chunk.aux_index) if chunk.last and chunk.carries_aux else b""

    def _pack_states(self, queued_at: float, chunk: Chunk, slot: int, layers: range) -> Packed:
        pool = self._pool if chunk.heads is None else self._pool.of_heads(chunk.heads)
        out, device_sum, states = self._slots[slot], self._sums[slot], self._pool.states
        assert states is not None
        assert chunk.state_slot is not None
        packed = states.pack(layers, chunk.state_slot)
        out[: len(packed)].copy_(packed, non_blocking=True)
        if device_sum is not None:
            device_sum.copy_(checksum(out[: len(packed)]), non_blocking=True)
        layout = chunk_layout(self._plan, chunk.prompt_tokens, chunk.start, chunk.stop, pool.kv_heads)
        aux = self._aux_row(chunk)
        event, fault = pool.record_event(), self._faults[slot]
        return Packed(
            queued_at, chunk, layout, pool.heads, slot, None, aux, event, fault, device_sum, state_bytes=len(packed)
        )

    def _pack(self, queued_at: float, chunk: Chunk, slot: int, pages: Any) -> Packed:
        out, device_sum, pieces = self._slots[slot], self._sums[slot], None
        pool = self._pool if chunk.heads is None else self._pool.of_heads(chunk.heads)
        rows = chunk.layers, chunk.reused_tokens
        layout = chunk_layout(self._plan, chunk.prompt_tokens, chunk.start, chunk.stop, pool.kv_heads, *rows)
        draft_bytes = pool.draft_bytes(chunk.start, chunk.stop) if layout.has_last else 0
        if chunk.span is not None and device_sum is None:
            first = pool.first_head - self._pool.first_head
            heads = None if pool is self._pool else slice(first, first + pool.kv_heads)
            pieces = chunk.span.payload(layout, out, pool.offsets, heads)
        else:
            slots = pool.slots(pages, chunk.stop - chunk.pages_start)[chunk.start - chunk.pages_start :]
            near = device_sum is not None or pool.keys[0].is_cpu  # `out` is where the pool is
            places = pool.destinations(slots)
            packed = pack(
                layout, pool.keys, pool.values, places.slots, out if near else None, pool.offsets, places.groups
            )
            if not near:
                out[: layout.total_bytes].copy_(packed, non_blocking=True)
            if pool.draft is not None and layout.has_last:
                rest = out[layout.total_bytes :]
                packed = pool.draft.pack(layout, slots, rest if near else None)
                if not near:
                    rest[: len(packed)].copy_(packed, non_blocking=True)
            if device_sum is not None:
                device_sum.copy_(checksum(out[: layout.total_bytes + draft_bytes]), non_blocking=True)
        aux = self._aux_row(chunk)
        event, fault = pool.record_event(), self._faults[slot]
        return Packed(queued_at, chunk, layout, pool.heads, slot, pieces, aux, event, fault, device_sum, draft_bytes)
