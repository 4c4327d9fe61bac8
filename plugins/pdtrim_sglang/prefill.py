"""The prefill worker's side of a transfer: it hears from its decode workers, and queues chunks to them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import ABORT_TAG, AbortNotification

from pdtrim_deploy.plan import PDPlan
from pdtrim_sglang import vital
from pdtrim_sglang.chunk_sizes import most_tokens
from pdtrim_sglang.layerwise import LayerwiseSends
from pdtrim_sglang.messages import Register, Room, parse
from pdtrim_sglang.metrics import Held, TransferMetrics
from pdtrim_sglang.pairing import Ranks, RoomInfo, disagreement, rejection
from pdtrim_sglang.peer import Chunk, Peer
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.prefill_rooms import PrefillRooms
from pdtrim_sglang.progress import RoomProgress
from pdtrim_sglang.prompt_tail.tails import PromptTails
from pdtrim_sglang.request_pages import WaitingPages
from pdtrim_sglang.rooms import AuxRows
from pdtrim_sglang.sessions import Sessions
from pdtrim_sglang.staging import Arena, Staging
from pdtrim_sglang.transports import TransportConfig, transport_named
from pdtrim_sglang.worker import Worker

SWEEP_SECONDS = 10.0
logger = logging.getLogger("sglang.srt.pdtrim.prefill")


class PrefillSide:
    """The rooms and decode workers of this worker, its control channel, and what its scheduler calls.

    `tails` are those of a model whose plan has a tail, `staging` is made when the worker's model is an engine that
    packs the rows to send (`stage_in_engine`), `layerwise` when rows of finished layers are to leave during a forward
    pass (`send_by_layer`).
    """

    staging: Staging | None = None
    layerwise: LayerwiseSends | None = None
    tails: PromptTails | None = None

    def __init__(
        self,
        manager: Worker,
        plan: PDPlan,
        pool: PoolView,
        aux: AuxRows,
        transport: str,
        config: TransportConfig,
    ) -> None:
        self._manager, self._plan, self._pool, self._aux, self._config = manager, plan, pool, aux, config
        self._ranks = Ranks(manager.attn_tp_size, manager.attn_tp_rank, plan.model.num_kv_heads)
        self._transport = transport_named(transport)
        self._transport.prepare(manager.local_ip, config)
        self.sessions = Sessions(self._make_peer)
        self._waiting = WaitingPages()
        self.rooms = PrefillRooms(manager, plan, TransferMetrics(), self._held, pool.draft_bytes(0, 1))
        vital.start("control channel", self._control)

    @property
    def max_chunk_tokens(self) -> int:
        """Longest chunk of whole pages whose rows fit a staging slot whatever its place in the prompt."""
        pool = self._pool
        beside = pool.draft_bytes(0, 1)
        return most_tokens(self._plan, pool.page_size, pool.kv_heads, self._config.staging_bytes, beside)

    @property
    def on_gpu(self) -> bool:
        """Whether the KV pool is on one."""
        return self._pool.keys[0].is_cuda

    def stage_in_engine(self) -> Staging:
        """From now on an engine packs what its forward passes compute; called before the first request."""
        keys = self._pool.keys[0]
        arena = Arena(self._config.staging_bytes * self._config.staging_slots, keys.device)
        self.staging = Staging(self._plan, self._pool.kv_heads, keys.dtype, arena)
        return self.staging

    def send_by_layer(self) -> LayerwiseSends:
        """From now on parts of chunks leave while they are computed; called before the first request."""
        sizes = self._config.part_bytes, self.max_chunk_tokens
        self.layerwise = LayerwiseSends(self._plan, self._pool, *sizes, self._queue)
        return self.layerwise

    def expect(self, rid: str, room: int, prompt_tokens: int) -> None:
        """SGLang's request `rid` will be computed here and sent to `room`."""
        self._waiting.expect(rid, room)
        if self.tails is not None:
            self.tails.expect(rid, room, prompt_tokens)
        if self.staging is not None:
            self.staging.expect(rid, room, prompt_tokens)
        if self.layerwise is not None:
            self.layerwise.expect(rid, room, prompt_tokens)

    @contextmanager
    def moving(self, rid: str, pages: Callable[[int, int], Any]) -> Iterator[None]:
        """Inside, SGLang may exchange pages of request `rid`; then `pages(start, stop)` are those of its tokens."""
        early = nullcontext() if self.layerwise is None else self.layerwise.moving(rid, pages)
        with self._waiting.moving(rid, pages, self._pool), early:
            yield

    @property
    def prompt_tail(self) -> int:
        """Last tokens of a prompt whose rows depend on where it ends: none is reused, or kept for other prompts."""
        return self._plan.kv_only_tail

    def first_sent(self, reused_tokens: int) -> int:
        """The first token that is sent of a prompt, of whose first `reused_tokens` decode's full layers have rows."""
        return self._plan.first_sent(reused_tokens)

    def ready(self, room: int, reused_tokens: int) -> None:
        """Decode waits for the rows of a request, and has those of so many tokens in its full layers."""
        if self.layerwise is not None:
            self.layerwise.ready(room, reused_tokens)

    def sender_opened(self, room: int) -> RoomProgress:
        """The scheduler has a sender for this room; returns where its progress will be written."""
        return self.rooms.sender_opened(room)

    def sender_closed(self, room: int, opened: bool) -> None:
        """The scheduler is done with this room; unless decode has `opened` it, it may still do so and wait."""
        if self.layerwise is not None:  # first, so that no part leaves for a room without a sender
            self.layerwise.forget(room)
        self._waiting.forget(room)
        if self.tails is not None:
            self.tails.forget(room)
        early = self.rooms.sender_closed(room, opened)
        self.sessions.forget(room)
        if self.staging is not None:
            self.staging.forget(room)
        self.rooms.released()
        for message in early:
            self._open(message)

    def sender_aborted(self, room: int, opened: bool) -> None:
        """As `sender_closed`; SGLang may ask for the room's state once more, or forget it."""
        self.sender_closed(room, opened)
        self.rooms.bury(room)

    def submit(self, chunk: Chunk) -> None:
        """Queue what has not left of a chunk; a failed or unknown room's is dropped, as SGLang's own backends do.

        Of all but the last one the prefix cache may exchange pages while it waits: those at its end that the cache did
        not insert with it (under EAGLE, whose keys are pairs of tokens, and with windows or linear attention).
        """
        if not chunk.last:
            chunk = replace(chunk, moving=self._waiting.add(chunk.room, chunk.start, chunk.stop, chunk.pages))
        if self.layerwise is not None:
            self.layerwise.submit(chunk)
        else:
            self._queue(self._parts(chunk))

    def _queue(self, parts: Sequence[Chunk]) -> None:
        """Queue chunks of one room, in order."""
        parts = self._with_states(parts)
        chunk = parts[-1]
        infos = self._manager.transfer_infos.get(chunk.room)
        if not infos or self._manager.request_status.get(chunk.room) in (None, KVPoll.Failed):
            return
        info = next(iter(infos.values()))
        if info.prompt_tokens != chunk.prompt_tokens:
            reason = f"prefill sees {chunk.prompt_tokens} prompt tokens, decode {info.prompt_tokens}"
            self.rooms.fail(chunk.room, reason)
            return
        progress = self.rooms.progress(chunk.room)
        if progress is None:  # the scheduler has closed its sender meanwhile, while a part was to leave
            return
        receivers = [info for info in infos.values() if info.heads]
        with progress.lock:  # all of them before the first is sent: none is the last one while others wait
            progress.queued += len(parts) * len(receivers)
        progress.reused_tokens = chunk.reused_tokens
        progress.started = progress.started or time.monotonic()
        for info in receivers:
            if reason := self.sessions.submit(info, parts):
                self.rooms.fail(chunk.room, reason)
                return
        if chunk.last and not receivers:  # another rank sends its copy of the heads
            self.rooms.arrived(chunk.room)

    def _with_states(self, parts: Sequence[Chunk]) -> Sequence[Chunk]:
        """The chunks, and behind a prompt's last rows its states, which complete the request.

        The room fails where SGLang has named no slot of them.
        """
        end, states = parts[-1], self._pool.states
        if states is None or not end.last:
            return parts
        if end.state_slot is None:
            self.rooms.fail(end.room, "prefill has no slot for this request's states")
            return parts
        ranges = list(states.parts(self._config.staging_bytes))
        rows = [*parts[:-1], replace(end, last=False)]
        rest = replace(end, start=end.prompt_tokens, stop=end.prompt_tokens, layers=None, span=None, moving=None)
        return rows + [replace(rest, states=layers, last=layers is ranges[-1]) for layers in ranges]

    def stalled(self, room: int, reason: str) -> None:
        """Decode has been silent for too long: end the request, and the connections on which it was waited for."""
        sessions = [info.session for info in self._manager.transfer_infos.get(room, {}).values()]
        silent = self.sessions.awaited(room, sessions)
        self.rooms.fail(room, reason)
        for peer in silent:
            peer.abandon()

    def _held(self) -> Held:
        used = self.staging.used_bytes if self.staging is not None else 0
        return Held(rooms=len(self.rooms), staging_bytes=used, peers=len(self.sessions))

    def _make_peer(self, decode: Register) -> Peer:
        context = self.rooms, self._plan, self._pool, self._aux, self._manager.prefill_rank
        return Peer(decode.host, decode.data_port, self._transport.channel, self._config, *context)

    def _parts(self, chunk: Chunk) -> list[Chunk]:
        """The chunk, cut where rows lie in the staging arena and where they must be gathered from its pages."""
        if self.staging is None:
            return [chunk]
        cuts = self.staging.cut(chunk.room, chunk.start, chunk.stop)
        ends = [chunk.last and stop == chunk.stop for _, stop, _ in cuts]
        return [
            replace(chunk, start=start, stop=stop, last=last, span=span)
            for (start, stop, span), last in zip(cuts, ends, strict=True)
        ]

    def _control(self) -> None:
        swept = time.monotonic()
        while True:
            left = swept + SWEEP_SECONDS - time.monotonic()
            if left <= 0:
                self.sessions.sweep()
                self.rooms.released()
                swept = time.monotonic()
            elif self._manager.server_socket.poll(1000 * left):
                frames = self._manager.server_socket.recv_multipart()
                try:
                    self._handle(frames)
                except Exception:  # one bad message must not end the thread that all requests need
                    logger.exception("pdtrim: control message failed")

    def _handle(self, frames: list[bytes]) -> None:
        if frames[0] == ABORT_TAG:
            notification = AbortNotification.from_zmq(frames)
            if notification is not None:
                self.rooms.abort(notification.room)
            return
        message = parse(frames)
        if isinstance(message, Register):
            self._register(message)
        elif isinstance(message, Room):
            self._open(message)
        else:
            logger.warning("pdtrim: dropping a malformed control message of %d frames", len(frames))

    def _register(self, message: Register) -> None:
        reason = rejection(message, self._plan, self._ranks, self._aux, self._pool.draft)
        if reason:
            logger.error("pdtrim: refusing decode worker %s: %s", message.session, reason)
            self.sessions.reject(message, reason)
            return
        self._pool.prepare(self._plan, self._ranks.share(message)[0])
        if reason := self.sessions.register(message):
            logger.error("pdtrim: %s", reason)

    def _open(self, message: Room) -> None:
        if self.rooms.defers(message):
            return
        decode = self.sessions.renewed(message.session)
        info = RoomInfo.of(message, self._ranks, decode)
        others = self.rooms.announce(message, info)
        reason = self.sessions.refusal(message.session)
        if not reason and decode is not None:
            known = [(other, self.sessions.registration(other.session)) for other in others]
            reason = disagreement(message, decode, self._ranks, known)
        self.rooms.open(message, reason)
