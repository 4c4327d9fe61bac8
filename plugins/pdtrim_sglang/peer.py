"""One decode worker as a prefill worker sees it: a queue, a thread, a staging buffer and a channel.

A peer of its own thread means that a decode worker which hangs holds up nobody else's requests.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack
from pdtrim_deploy.plan import PDPlan
from pdtrim_sglang import vital
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.progress import RoomProgress
from pdtrim_sglang.protocol import ChunkHeader, Reply
from pdtrim_sglang.rooms import AuxRows
from pdtrim_sglang.staging import Span
from pdtrim_sglang.transports import SendChannel, TransportConfig
from pdtrim_sglang.transports.base import TransportError, UnreachableError


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens `[start, stop)` of a request.

    Attributes:
        pages: int32, of this worker's pool; the first one begins with token `pages_start`.
        events: device events after which `pages`, and the pages, may be read.
        span: where an engine has packed the rows already.

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


class Owner(Protocol):
    """What a peer needs of the prefill side."""

    def is_live(self, room: int) -> bool: ...
    def progress(self, room: int) -> RoomProgress | None: ...
    def fail(self, room: int, reason: str) -> None: ...
    def arrived(self, room: int) -> None: ...
    def released(self) -> None: ...


class Peer:
    """Packs and sends queued chunks in order; follows the replies."""

    def __init__(
        self,
        host: str,
        port: int,
        make_channel: Callable[..., SendChannel],
        config: TransportConfig,
        owner: Owner,
        plan: PDPlan,
        pool: PoolView,
        aux: AuxRows,
        rank: int,
    ) -> None:
        self._owner, self._plan, self._pool, self._aux, self._rank = owner, plan, pool, aux, rank
        self._digest = bytes.fromhex(plan.digest)
        self._channel = make_channel(host, port, self, config)
        self._chunks: queue.SimpleQueue[tuple[float, Chunk] | None] = queue.SimpleQueue()
        self._unanswered: set[int] = set()
        self._open, self._lost = 0, False  # chunks submitted and not yet sent or failed
        self._lock = threading.Lock()  # over progress (a reply may overtake the return of its own send) and open chunks
        vital.start(f"sender to {host}:{port}", self._run)

    def submit(self, chunk: Chunk) -> None:
        """Queue one chunk; chunks of a room leave in the order they came."""
        with self._lock:
            self._open += 1
        self._chunks.put((time.monotonic(), chunk))

    @property
    def gone(self) -> bool:
        """Whether its connection was lost and nothing is on its way: it may be closed, and made anew when needed."""
        return self._lost and not self._open and not self._unanswered

    def forget(self, room: int) -> None:
        """The scheduler is done with this room: nobody waits for its replies."""
        self._unanswered.discard(room)

    def abandon(self) -> None:
        """It has gone silent: break the connection, all that waits for a reply fails, what comes next connects anew."""
        self._channel.abandon()

    def close(self) -> None:
        """End its thread and its connection; call it when it is `gone`."""
        self._chunks.put(None)

    def on_reply(self, reply: Reply) -> None:
        """Called by the channel for each chunk, in order."""
        progress = self._owner.progress(reply.room)
        if not reply.ok:
            self._unanswered.discard(reply.room)
            self._owner.fail(reply.room, reply.reason)
        elif progress is None:  # it ended while this chunk was on its way
            self._unanswered.discard(reply.room)
        else:
            with self._lock:
                progress.acknowledged += 1
                complete = progress.complete
            if complete:
                self._arrived(reply.room, progress)

    def on_lost(self, reason: str) -> None:
        """Called by the channel when its connection broke."""
        lost, self._unanswered = self._unanswered, set()
        self._lost = True
        for room in tuple(lost):  # another thread may have got hold of the set
            self._owner.fail(room, reason)

    def _arrived(self, room: int, progress: RoomProgress) -> None:
        if progress.started is not None:
            progress.seconds = time.monotonic() - progress.started
        self._unanswered.discard(room)
        self._owner.arrived(room)

    def _run(self) -> None:
        failed_at, why = 0.0, ""
        while (item := self._chunks.get()) is not None:
            queued_at, chunk = item
            try:
                if queued_at < failed_at:  # it waited for the attempt that failed: one deadline for all, not one each
                    self._owner.fail(chunk.room, why)
                else:
                    self._send(chunk)
            except UnreachableError as error:
                failed_at, why = time.monotonic(), str(error)
                self._lost = True
                self._owner.fail(chunk.room, why)
            except TransportError as error:
                self._owner.fail(chunk.room, str(error))
            except Exception as error:  # whatever it was, it ends this request and not this thread
                self._owner.fail(chunk.room, f"packing failed: {error}")
            with self._lock:
                self._open -= 1
            del item, chunk  # it may hold staging memory
            self._owner.released()
        self._channel.close()

    def _send(self, chunk: Chunk) -> None:
        for event in chunk.events:
            event.synchronize()
        progress = self._owner.progress(chunk.room)
        if progress is None or not self._owner.is_live(chunk.room):
            return
        layout = chunk_layout(self._plan, chunk.prompt_tokens, chunk.start, chunk.stop, self._pool.kv_heads)
        payload = None
        if chunk.span is not None:
            payload = chunk.span.payload(layout, self._channel.staging, self._pool.offsets)
        else:
            slots = self._pool.slots(chunk.pages, chunk.stop - chunk.pages_start)[chunk.start - chunk.pages_start :]
            pack(layout, self._pool.keys, self._pool.values, slots, self._channel.staging, self._pool.offsets)
        aux = memoryview(self._aux.read(chunk.aux_index) if chunk.last else b"")
        if not self._owner.is_live(chunk.room):  # failed while packing: the pages may have been another's
            return
        header = ChunkHeader(
            self._digest, chunk.room, self._rank, chunk.prompt_tokens, chunk.start, chunk.stop,
            len(aux), layout.total_bytes, chunk.last,
        )  # fmt: skip
        self._unanswered.add(chunk.room)
        progress.prompt_tokens = chunk.prompt_tokens
        wire_bytes = self._channel.send(header, aux, payload)
        self._lost = False
        with self._lock:
            if chunk.last:
                progress.last_sent = time.monotonic()
            progress.sent += 1
            progress.wire_bytes += wire_bytes
            progress.payload_bytes += layout.total_bytes
            progress.staged_bytes += layout.total_bytes if chunk.span is not None else 0
            complete = progress.complete
        if complete:
            self._arrived(chunk.room, progress)
