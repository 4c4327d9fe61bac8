"""The prefill worker's side of a transfer: it learns its decode workers and rooms, and queues chunks to them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import ABORT_TAG, AbortNotification

from pdtrim_deploy.plan import PDPlan
from pdtrim_sglang import vital
from pdtrim_sglang.chunk_sizes import most_tokens
from pdtrim_sglang.messages import Register, Room, parse
from pdtrim_sglang.metrics import Held, TransferMetrics
from pdtrim_sglang.pairing import Ranks, RoomInfo, rejection
from pdtrim_sglang.peer import Chunk, Peer
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.progress import RoomProgress
from pdtrim_sglang.rooms import AuxRows
from pdtrim_sglang.staging import Arena, Staging
from pdtrim_sglang.transports import TransportConfig, transport_named
from pdtrim_sglang.worker import Worker

MOST_REMEMBERED = 10_000
SWEEP_SECONDS = 10.0
logger = logging.getLogger("sglang.srt.pdtrim.prefill")


class PrefillSide:
    """Decode workers by session, and the progress of every room whose transfer has begun.

    `staging` is made when the worker's model is an engine that packs the rows to send (`stage_in_engine`).
    """

    staging: Staging | None = None

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
        self._known: dict[str, Register] = {}
        self._peers: dict[str, Peer] = {}
        self._peers_lock = threading.Lock()
        self._rejected: dict[str, str] = {}
        self._progress: dict[int, RoomProgress] = {}
        self._senders: set[int] = set()
        self._tombstones: deque[tuple[float, int]] = deque()
        self._tombstones_lock = threading.Lock()
        self._ended_unopened: dict[int, None] = {}  # in order
        self._metrics = TransferMetrics()
        vital.start("control channel", self._control)

    @property
    def max_chunk_tokens(self) -> int:
        """Longest chunk of whole pages whose rows fit a staging slot whatever its place in the prompt."""
        return most_tokens(self._plan, self._pool.page_size, self._pool.kv_heads, self._config.staging_bytes)

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

    def expect(self, rid: str, room: int, prompt_tokens: int) -> None:
        """SGLang's request `rid` will be computed here and sent to `room`."""
        if self.staging is not None:
            self.staging.expect(rid, room, prompt_tokens)

    def sender_opened(self, room: int) -> RoomProgress:
        """The scheduler has a sender for this room; returns where its progress will be written."""
        self._senders.add(room)
        self._ended_unopened.pop(room, None)
        progress = self._progress[room] = RoomProgress()
        self.released()
        return progress

    def sender_closed(self, room: int, opened: bool) -> None:
        """The scheduler is done with this room; unless decode has `opened` it, it may still do so and wait."""
        self._senders.discard(room)
        if not opened:
            self._ended_unopened[room] = None
            if len(self._ended_unopened) > MOST_REMEMBERED:
                del self._ended_unopened[next(iter(self._ended_unopened))]
        self._progress.pop(room, None)
        for peer in list(self._peers.values()):  # of a prompt aborted between its chunks no reply is outstanding
            peer.forget(room)
        if self.staging is not None:
            self.staging.forget(room)
        self.released()

    def sender_aborted(self, room: int, opened: bool) -> None:
        """As `sender_closed`; SGLang may ask for the room's state once more, or forget it."""
        self.sender_closed(room, opened)
        self._bury(room)

    def opened(self, room: int) -> bool:
        """Whether every rank of decode that takes this room's KV from here has said where it goes."""
        infos = self._manager.transfer_infos.get(room, {})
        return any(len(infos) == info.required_dst_info_num for info in infos.values())

    def released(self) -> None:
        """Something was taken or given back: write down what is held now."""
        self._metrics.held(self._held)

    def _held(self) -> Held:
        used = self.staging.used_bytes if self.staging is not None else 0
        return Held(rooms=len(self._progress), staging_bytes=used, peers=len(self._peers))

    def progress(self, room: int) -> RoomProgress | None:
        """Bytes and times of a room, None when it has no sender."""
        return self._progress.get(room)

    def submit(self, chunk: Chunk) -> None:
        """Queue a chunk; a failed or unknown room's chunk is dropped, as SGLang's own backends do."""
        infos = self._manager.transfer_infos.get(chunk.room)
        if not infos or self._manager.request_status.get(chunk.room) in (None, KVPoll.Failed):
            return
        info = next(iter(infos.values()))
        if info.prompt_tokens != chunk.prompt_tokens:
            self.fail(chunk.room, f"prefill sees {chunk.prompt_tokens} prompt tokens, decode {info.prompt_tokens}")
            return
        progress = self._progress[chunk.room]
        parts, receivers = self._parts(chunk), [info for info in infos.values() if info.heads]
        with progress.lock:  # all of them before the first is sent: none is the last one while others wait
            progress.queued += len(parts) * len(receivers)
        progress.reused_tokens = info.prefix_tokens
        progress.started = progress.started or time.monotonic()
        for info in receivers:
            if reason := self._submit(info, parts):
                self.fail(chunk.room, reason)
                return
        if chunk.last and not receivers:  # another rank sends its copy of the heads
            self.arrived(chunk.room)

    def _submit(self, info: RoomInfo, parts: list[Chunk]) -> str:
        """Queue a chunk's parts to one rank of decode; returns why not, or nothing."""
        own = [replace(part, heads=info.heads, carries_aux=info.carries_aux) for part in parts]
        while not (reason := self._prepared(info.session)):
            with self._peers_lock:
                if (peer := self._peers.get(info.session)) is None:  # it was swept away just now
                    continue
                for part in own:
                    peer.submit(part)
                return ""
        return reason

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

    def fail(self, room: int, reason: str, outcome: str = "failed") -> None:
        """End a request here and on the decode side; counted as `outcome`."""
        if self._manager.request_status.get(room) in (None, KVPoll.Failed, KVPoll.Success):
            return
        logger.warning("pdtrim: room %s failed: %s", room, reason)
        self._manager.conclude_failure(bootstrap_room=room, failure_reason=reason)
        self._metrics.ended(outcome)

    def stalled(self, room: int, reason: str) -> None:
        """Decode has been silent for too long: end the request, and the connections on which it was waited for."""
        sessions = [info.session for info in self._manager.transfer_infos.get(room, {}).values()]
        silent = [peer for peer in map(self._peers.get, sessions) if peer is not None and peer.awaits(room)]
        self.fail(room, reason)
        for peer in silent:
            peer.abandon()

    def arrived(self, room: int) -> None:
        """Every chunk of the room was acknowledged, or none was to be sent from this rank."""
        progress = self._progress.get(room)
        if progress is None or not self.is_live(room):
            return
        heads = sum(len(info.heads) for info in self._manager.transfer_infos.get(room, {}).values())
        if heads:
            reused, of = progress.reused_tokens, self._plan.model.num_kv_heads
            dense = self._plan.dense_bytes(progress.prompt_tokens - reused)  # of all heads, as payload is of those sent
            spared = self._plan.payload_bytes(reused) if reused else 0
            self._metrics.succeeded(progress, *(size * heads // of for size in (dense, spared)))
        else:
            self._metrics.ended("success")
        # decode knows already: it scattered the last chunk
        self._manager.conclude_transfer(bootstrap_room=room, status=KVPoll.Success, targets=[])

    def is_live(self, room: int) -> bool:
        """Whether the room's chunks are still wanted."""
        return self._manager.request_status.get(room) not in (None, KVPoll.Failed)

    def _control(self) -> None:
        swept = time.monotonic()
        while True:
            left = swept + SWEEP_SECONDS - time.monotonic()
            if left <= 0:
                self._sweep()
                swept = time.monotonic()
            elif self._manager.server_socket.poll(1000 * left):
                frames = self._manager.server_socket.recv_multipart()
                try:
                    self._handle(frames)
                except Exception:  # one bad message must not end the thread that all requests need
                    logger.exception("pdtrim: control message failed")

    def _sweep(self) -> None:
        """End what is kept for decode workers whose connections are lost; who comes again gets it anew."""
        with self._peers_lock:
            for session in [session for session, peer in self._peers.items() if peer.gone]:
                self._peers.pop(session).close()
        self.released()

    def _handle(self, frames: list[bytes]) -> None:
        if frames[0] == ABORT_TAG:
            notification = AbortNotification.from_zmq(frames)
            if notification is not None:
                self._abort(notification.room)
            return
        message = parse(frames)
        if isinstance(message, Register):
            self._register(message)
        elif isinstance(message, Room):
            self._open(message)
        else:
            logger.warning("pdtrim: dropping a malformed control message of %d frames", len(frames))

    def _register(self, message: Register) -> None:
        reason = rejection(message, self._plan, self._ranks, self._aux)
        if reason:
            logger.error("pdtrim: refusing decode worker %s: %s", message.session, reason)
            _remember(self._rejected, message.session, reason)
            return
        self._rejected.pop(message.session, None)
        self._pool.prepare(self._plan, self._ranks.share(message)[0])
        with self._peers_lock:
            _remember(self._known, message.session, message)
        if reason := self._prepared(message.session):
            logger.error("pdtrim: %s", reason)

    def _prepared(self, session: str) -> str:
        """Have a peer for a decode worker that has registered; why there can be none, in one sentence, or nothing.

        The control thread calls it when a worker registers and when it opens a room, since pinned memory takes tens of
        milliseconds to make and to register: the scheduler seldom has to.
        """
        with self._peers_lock:
            known = self._known.get(session)
            if known is None:
                return f"decode worker {session} never registered"
            if session in self._peers:
                return ""
        context = (self, self._plan, self._pool, self._aux, self._manager.prefill_rank)
        try:
            peer = Peer(known.host, known.data_port, self._transport.channel, self._config, *context)
        except Exception as error:  # memory that cannot be registered must end neither scheduler nor control thread
            return f"cannot prepare to send to decode worker {session}: {error}"
        with self._peers_lock:
            if self._peers.setdefault(session, peer) is not peer:
                peer.close()
        return ""

    def _open(self, message: Room) -> None:
        manager = self._manager
        with self._peers_lock:
            if (decode := self._known.get(message.session)) is not None:
                _remember(self._known, message.session, decode)
        share = self._ranks.share(decode) if decode is not None else (range(0), False)
        info = RoomInfo(
            message.session, message.host, message.control_port,
            message.prompt_tokens, message.prefix_tokens, message.destinations, *share,
        )  # fmt: skip
        others = {k: other for k, other in manager.transfer_infos.get(message.room, {}).items() if k != message.session}
        manager.update_status(message.room, KVPoll.Bootstrapping)
        manager.transfer_infos[message.room] = {**others, message.session: info}
        reason = self._rejected.get(message.session) or self._prepared(message.session)
        if not reason and decode is not None:
            reason = self._disagreement(message, decode, others.values())
        failed = manager.request_status.get(message.room) == KVPoll.Failed  # by an abort or a deadline
        if not reason and (failed or message.room in self._ended_unopened):
            reason = "the request ended on the prefill side before decode had room for it"
        if reason:
            if failed:  # when there was nobody to tell; `fail` takes it for told
                manager.conclude_failure(bootstrap_room=message.room, failure_reason=reason)
            else:
                self.fail(message.room, reason)
            self._bury(message.room)
            return
        if self.opened(message.room):
            manager.req_to_decode_prefix_len[message.room] = message.prefix_tokens
            manager.update_status(message.room, KVPoll.WaitingForInput)

    def _disagreement(self, message: Room, decode: Register, others: Iterable[RoomInfo]) -> str:
        """Why what a rank of decode says of a request does not go with what the others said, or nothing."""
        if message.destinations != (expected := self._ranks.destinations(decode)):
            return (
                f"{message.destinations} ranks of decode are to take this rank's KV, {expected} do of {decode.tp_size} "
                f"that divide attention there, and {self._ranks.size} here"
            )
        prompt = message.prompt_tokens, message.prefix_tokens
        for other in others:
            rank = self._known.get(other.session)
            if rank is not None and (rank.tp_size, rank.tp_rank) == (decode.tp_size, decode.tp_rank):
                return f"two decode workers are rank {decode.tp_rank} of {decode.tp_size} of this request"
            if (other.prompt_tokens, other.prefix_tokens) != prompt:
                return (
                    f"ranks of decode differ: {other.prompt_tokens} prompt tokens of which they have "
                    f"{other.prefix_tokens}, and {prompt[0]} of which they have {prompt[1]}"
                )
        return ""

    def _abort(self, room: int) -> None:
        if self._manager.request_status.get(room) in (KVPoll.Success, KVPoll.Failed):
            return
        if room in self._senders:
            self._metrics.ended("aborted")
        self._manager.update_status(room, KVPoll.Bootstrapping)
        self._manager.update_status(room, KVPoll.Failed)
        self._bury(room)

    def _bury(self, room: int) -> None:
        """Remember a failed room that has no sender yet, so that a late one fails at once; forget it in time."""
        now = time.monotonic()
        with self._tombstones_lock:
            if room not in self._senders:
                self._tombstones.append((now + self._manager.bootstrap_timeout, room))
            while self._tombstones and self._tombstones[0][0] < now:
                _, old = self._tombstones.popleft()
                if old not in self._senders:
                    self._manager.request_status.pop(old, None)
                    self._manager.transfer_infos.pop(old, None)
                    self._manager.failure_records.pop(old, None)
                    self._manager.req_to_decode_prefix_len.pop(old, None)


def _remember(sessions: dict[str, Any], session: str, status: Any) -> None:
    """Keep the last status of a session. A restarted decode worker is a new session, so the oldest ones are dropped."""
    sessions.pop(session, None)
    sessions[session] = status
    if len(sessions) > MOST_REMEMBERED:
        del sessions[next(iter(sessions))]
