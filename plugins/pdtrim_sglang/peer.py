"""One rank of decode as a rank of prefill sees it: a queue, a ring of staging slots, two threads and a channel.

One thread packs chunks into free slots, the other one sends them, so a chunk is packed while another one travels.
Threads of its own mean that a decode worker which hangs holds up nobody else's requests.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pdtrim_deploy.plan import PDPlan
from pdtrim_sglang import vital
from pdtrim_sglang.packing import Chunk, Packed, Packer
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.progress import RoomProgress
from pdtrim_sglang.protocol import ChunkHeader, Reply
from pdtrim_sglang.rooms import AuxRows
from pdtrim_sglang.transports import SendChannel, TransportConfig
from pdtrim_sglang.transports.base import TransportError, UnreachableError
from pdtrim_sglang.transports.sums import as_bytes

__all__ = ["Chunk", "Owner", "Peer"]
logger = logging.getLogger("sglang.srt.pdtrim.prefill")


class Owner(Protocol):
    """What a peer needs of the prefill side."""

    def is_live(self, room: int) -> bool: ...
    def progress(self, room: int) -> RoomProgress | None: ...
    def fail(self, room: int, reason: str) -> None: ...
    def arrived(self, room: int) -> None: ...
    def released(self) -> None: ...


@dataclass
class _Unanswered:
    """Chunks of a room that this peer has sent and has no reply to yet; whether its last one is among those sent."""

    chunks: int = 0
    last: bool = False


class Peer:
    """Packs and sends queued chunks in order; follows the replies.

    Where several ranks of decode take one rank's KV, each has a peer, and a room's progress is that of all.
    """

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
        self._owner, self._rank, self._digest = owner, rank, bytes.fromhex(pool.digest(plan))
        self._channel = make_channel(host, port, self, config)
        self._packer = Packer(plan, pool, aux, self._channel.slots)
        self._chunks: queue.SimpleQueue[tuple[float, Chunk] | None] = queue.SimpleQueue()
        self._packed: queue.SimpleQueue[Packed | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(len(self._channel.slots)):
            self._free.put(slot)
        self._failed = 0.0, ""  # when it could not be reached last, and why
        self._unanswered: dict[int, _Unanswered] = {}  # by room
        self._open, self._lost = 0, False  # chunks submitted and not yet sent or failed
        self._lock = threading.Lock()  # over the three
        vital.start(f"packer for {host}:{port}", self._pack)
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
        with self._lock:
            self._unanswered.pop(room, None)

    def awaits(self, room: int) -> bool:
        """Whether this room's rows are not all here acknowledged, of those that were to go through this peer."""
        return room in self._unanswered

    def abandon(self) -> None:
        """It has gone silent: break the connection, all that waits for a reply fails, what comes next connects anew."""
        self._channel.abandon()

    def close(self) -> None:
        """End its threads and its connection; call it when it is `gone`."""
        self._chunks.put(None)

    def on_reply(self, reply: Reply) -> None:
        """Called by the channel for each chunk, in order."""
        progress = self._owner.progress(reply.room)
        if not reply.ok:
            self.forget(reply.room)
            self._owner.fail(reply.room, reply.reason)
        elif progress is None:  # it ended while this chunk was on its way
            self.forget(reply.room)
        else:
            self._answered(reply.room)
            with progress.lock:
                progress.acknowledged += 1
                complete = progress.complete
            if complete:
                self._arrived(reply.room, progress)

    def _answered(self, room: int) -> None:
        with self._lock:
            if (sent := self._unanswered.get(room)) is not None:
                sent.chunks -= 1
                if sent.last and not sent.chunks:
                    del self._unanswered[room]

    def on_lost(self, reason: str) -> None:
        """Called by the channel when its connection broke."""
        with self._lock:
            lost, self._unanswered = tuple(self._unanswered), {}
            self._lost = True
        for room in lost:
            self._owner.fail(room, reason)

    def _arrived(self, room: int, progress: RoomProgress) -> None:
        if progress.started is not None:
            progress.seconds = time.monotonic() - progress.started
        self._owner.arrived(room)

    def _pack(self) -> None:
        while (item := self._chunks.get()) is not None:
            queued_at, chunk = item
            slot = self._free.get()
            packed = None
            try:
                if not self._missed(queued_at, chunk.room) and self._live(chunk.room):
                    packed = self._packer.pack(queued_at, chunk, slot)
            except Exception as error:  # whatever it was, it ends this request and not this thread
                logger.exception("pdtrim: a chunk was not packed")
                self._owner.fail(chunk.room, f"packing failed: {error}")
            if packed is not None:
                self._packed.put(packed)
            else:
                self._done(slot)
            del item, chunk, packed  # they may hold staging memory
        self._packed.put(None)

    def _run(self) -> None:
        self._connect()
        while (packed := self._packed.get()) is not None:
            room, slot = packed.chunk.room, packed.slot
            try:
                packed.wait()  # also where it is not sent: until then the GPU reads pages that the chunk keeps alive
                if not self._missed(packed.queued_at, room):
                    self._send(packed)
            except UnreachableError as error:
                self._unreachable(error)
                self.forget(room)  # nothing was sent, and the scheduler may have forgotten it before
                self._owner.fail(room, str(error))
            except TransportError as error:
                self._owner.fail(room, str(error))
            except Exception as error:  # of the GPU, say, when the packed rows are waited for
                logger.exception("pdtrim: a chunk was not packed or sent")
                self._owner.fail(room, f"packing failed: {error}")
            del packed  # it may hold staging memory
            self._done(slot)
        self._channel.close()

    def _connect(self) -> None:
        """Before there is anything to send: the first request need not wait for it, and who vanishes is noticed."""
        try:
            self._channel.connect()
        except UnreachableError as error:
            self._unreachable(error)

    def _unreachable(self, error: UnreachableError) -> None:
        self._failed = time.monotonic(), str(error)
        self._lost = True

    def _missed(self, queued_at: float, room: int) -> bool:
        """Whether a chunk waited for an attempt to connect that failed: one deadline for all of them, not one each."""
        failed_at, why = self._failed
        if queued_at < failed_at:
            self._owner.fail(room, why)
            return True
        return False

    def _done(self, slot: int) -> None:
        self._free.put(slot)
        with self._lock:
            self._open -= 1
        self._owner.released()

    def _live(self, room: int) -> bool:
        return self._owner.progress(room) is not None and self._owner.is_live(room)

    def _send(self, packed: Packed) -> None:
        chunk, size = packed.chunk, packed.payload_bytes
        progress = self._owner.progress(chunk.room)
        if progress is None or not self._owner.is_live(chunk.room):  # it failed: its pages may have been another's
            return
        header = ChunkHeader(
            self._digest, chunk.room, self._rank, chunk.prompt_tokens, chunk.start, chunk.stop,
            len(packed.aux), size, chunk.last, packed.heads, chunk.layers, chunk.reused_tokens, chunk.states,
        )  # fmt: skip
        with self._lock:
            sent = self._unanswered.setdefault(chunk.room, _Unanswered())
            sent.chunks, sent.last = sent.chunks + 1, chunk.last
        progress.prompt_tokens = chunk.prompt_tokens
        device_sum = None if packed.device_sum is None else as_bytes(packed.device_sum)
        self._lost = False  # before: the reader of replies may hear of a loss before this thread goes on
        wire_bytes = self._channel.send(header, memoryview(packed.aux), packed.slot, packed.pieces, device_sum)
        with progress.lock:
            if chunk.last:
                progress.last_sent = time.monotonic()
            progress.sent += 1
            progress.wire_bytes += wire_bytes
            progress.payload_bytes += size
            progress.draft_bytes += packed.draft_bytes
            progress.state_bytes += packed.state_bytes
            progress.staged_bytes += size if chunk.span is not None else 0
            progress.early_bytes += size if chunk.forward_pass is not None and chunk.forward_pass.runs else 0
            complete = progress.complete
        if complete:
            self._arrived(chunk.room, progress)
