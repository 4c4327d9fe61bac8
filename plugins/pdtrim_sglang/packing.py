"""A chunk's rows, packed into a staging slot: from the pool's pages, or from where an engine has packed them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdtrim_deploy.kvcache.layout import ChunkLayout, chunk_layout
from pdtrim_deploy.kvcache.pack import check, pack
from pdtrim_deploy.plan import PDPlan
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.rooms import AuxRows
from pdtrim_sglang.staging import Span


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens `[start, stop)` of a request.

    Attributes:
        pages: int32, of this worker's pool; the first one begins with token `pages_start`.
        events: device events after which `pages`, and the pages, may be read.
        span: where an engine has packed the rows already.
        heads: the KV heads to send, as the model counts them; all of this rank's when left out.
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
    carries_aux: bool = True


@dataclass(frozen=True)
class Packed:
    """A chunk whose bytes lie in slot number `slot`, or in `pieces` of it and of other memory, once `event` has come.

    They are of KV heads `heads`.
    `queued_at` is when the scheduler queued it, in seconds of the monotonic clock.
    """

    queued_at: float
    chunk: Chunk
    layout: ChunkLayout
    heads: range
    slot: int
    pieces: Sequence[memoryview] | None
    aux: bytes
    event: Any
    device: torch.device

    def wait(self) -> None:
        """Until the bytes are there. IndexError: a slot lay outside its pool."""
        if self.event is not None:
            self.event.synchronize()
        check(self.device)


class Packer:
    """Packs chunks of one pool into `slots`, uint8 on the host; used by one thread, on a GPU by its stream."""

    def __init__(self, plan: PDPlan, pool: PoolView, aux: AuxRows, slots: Sequence[Tensor]) -> None:
        self._plan, self._pool, self._aux, self._slots = plan, pool, aux, slots

    def pack(self, queued_at: float, chunk: Chunk, slot: int) -> Packed:
        """Pack a chunk whose room is live; a GPU may still be at it when this returns."""
        for event in chunk.events:
            event.synchronize()
        out, pieces = self._slots[slot], None
        pool = self._pool if chunk.heads is None else self._pool.of_heads(chunk.heads)
        layout = chunk_layout(self._plan, chunk.prompt_tokens, chunk.start, chunk.stop, pool.kv_heads)
        if chunk.span is not None:
            first = pool.first_head - self._pool.first_head
            heads = None if pool is self._pool else slice(first, first + pool.kv_heads)
            pieces = chunk.span.payload(layout, out, pool.offsets, heads)
        else:
            slots = pool.slots(chunk.pages, chunk.stop - chunk.pages_start)[chunk.start - chunk.pages_start :]
            if pool.keys[0].is_cpu:
                pack(layout, pool.keys, pool.values, slots, out, pool.offsets)
            else:
                packed = pack(layout, pool.keys, pool.values, slots, offsets=pool.offsets)
                out[: layout.total_bytes].copy_(packed, non_blocking=True)
        aux = self._aux.read(chunk.aux_index) if chunk.last and chunk.carries_aux else b""
        return Packed(queued_at, chunk, layout, pool.heads, slot, pieces, aux, pool.record_event(), pool.keys[0].device)
