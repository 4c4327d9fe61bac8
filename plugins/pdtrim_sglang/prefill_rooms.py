"""Requests that a prefill worker computes for decode workers: which are open, how far they are, how they ended.

SGLang's tables of them are in its KV manager (`worker.Worker`); what they do not hold is here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from sglang.srt.disaggregation.base.conn import KVPoll

from pdtrim_deploy.plan import PDPlan
from pdtrim_sglang.messages import Room
from pdtrim_sglang.metrics import Held, TransferMetrics
from pdtrim_sglang.pairing import RoomInfo
from pdtrim_sglang.progress import RoomProgress
from pdtrim_sglang.protocol import MAX_REASON_BYTES
from pdtrim_sglang.worker import Worker

MOST_ENDED = 10_000
logger = logging.getLogger("sglang.srt.pdtrim.prefill")


class PrefillRooms:
    """The progress of every room that has a sender, and the rooms that ended before decode had room for them.

    `held` counts what the whole worker holds; `draft_token_bytes` are those of a token in a draft model's pool.
    """

    def __init__(
        self,
        manager: Worker,
        plan: PDPlan,
        metrics: TransferMetrics,
        held: Callable[[], Held],
        draft_token_bytes: int = 0,
    ) -> None:
        self._manager, self._plan, self._metrics, self._held = manager, plan, metrics, held
        self._draft_token_bytes = draft_token_bytes
        self._progress: dict[int, RoomProgress] = {}
        self._senders: set[int] = set()
        self._tombstones: deque[tuple[float, int]] = deque()
        self._tombstones_lock = threading.Lock()
        self._ended_unopened: dict[int, None] = {}  # in order
        self._early: dict[int, list[Room]] = {}  # announced again while their sender is open
        self._early_lock = threading.Lock()

    def __len__(self) -> int:
        """Rooms that have a sender."""
        return len(self._progress)

    def released(self) -> None:
        """Something was taken or given back: write down what is held now."""
        self._metrics.held(self._held)

    def progress(self, room: int) -> RoomProgress | None:
        """Bytes and times of a room, None when it has no sender."""
        return self._progress.get(room)

    def is_live(self, room: int) -> bool:
        """Whether the room's chunks are still wanted."""
        return self._manager.request_status.get(room) not in (None, KVPoll.Failed)

    def opened(self, room: int) -> bool:
        """Whether every rank of decode that takes this room's KV from here has said where it goes."""
        infos = self._manager.transfer_infos.get(room, {})
        return any(len(infos) == info.required_dst_info_num for info in infos.values())

    def sender_opened(self, room: int) -> RoomProgress:
        """The scheduler has a sender for this room; returns where its progress will be written."""
        self._senders.add(room)
        self._ended_unopened.pop(room, None)
        progress = self._progress[room] = RoomProgress()
        self.released()
        return progress

    def sender_closed(self, room: int, opened: bool) -> list[Room]:
        """The scheduler is done with this room; unless decode has `opened` it, it may still do so and wait.

        Returns the messages that it `defers`, to be heard now.
        """
        with self._early_lock:
            self._senders.discard(room)
            self._progress.pop(room, None)
            early = self._early.pop(room, [])
        if not opened:
            self._ended_unopened[room] = None
            if len(self._ended_unopened) > MOST_ENDED:
                del self._ended_unopened[next(iter(self._ended_unopened))]
        return early

    def defers(self, message: Room) -> bool:
        """Whether to hear a message later: its room's sender has sent all, and would forget it when it is closed.

        Decode has a request's rows before prefill's scheduler hears of it. It may retract the request at once
        (`pause_generation` with mode `retract`), and ask for its rows anew.
        """
        with self._early_lock:
            progress, status = self._progress.get(message.room), self._manager.request_status.get(message.room)
            early = progress is not None and (progress.last_sent is not None or status == KVPoll.Success)
            if early:
                self._early.setdefault(message.room, []).append(message)
            return early

    def announce(self, message: Room, info: RoomInfo) -> list[RoomInfo]:
        """A rank of decode says where the room's rows go; returns what other ranks have said of it before."""
        infos = self._manager.transfer_infos
        others = {session: other for session, other in infos.get(message.room, {}).items() if session != info.session}
        self._manager.update_status(message.room, KVPoll.Bootstrapping)
        infos[message.room] = {**others, info.session: info}
        return list(others.values())

    def open(self, message: Room, reason: str) -> None:
        """Wait for chunks of an announced room, unless there is a `reason` why it must fail."""
        manager, room = self._manager, message.room
        failed = manager.request_status.get(room) == KVPoll.Failed  # by an abort or a deadline
        if not reason and (failed or room in self._ended_unopened):
            reason = "the request ended on the prefill side before decode had room for it"
        if reason:
            if failed:  # when there was nobody to tell; `fail` takes it for told
                manager.conclude_failure(bootstrap_room=room, failure_reason=reason)
            else:
                self.fail(room, reason)
            self.bury(room)
        elif self.opened(room):
            manager.req_to_decode_prefix_len[room] = message.prefix_tokens
            manager.update_status(room, KVPoll.WaitingForInput)

    def fail(self, room: int, reason: str, outcome: str = "failed") -> None:
        """End a request here and on the decode side; counted as `outcome`."""
        if self._manager.request_status.get(room) in (None, KVPoll.Failed, KVPoll.Success):
            return
        logger.warning("pdtrim: room %s failed: %s", room, reason)
        short = reason[:MAX_REASON_BYTES]  # a compiler's whole log, say, would not pass the control channel
        self._manager.conclude_failure(bootstrap_room=room, failure_reason=short)
        self._metrics.ended(outcome)

    def arrived(self, room: int) -> None:
        """Every chunk of the room was acknowledged, or none was to be sent from this rank."""
        progress = self._progress.get(room)
        if progress is None or not self.is_live(room):
            return
        heads = sum(len(info.heads) for info in self._manager.transfer_infos.get(room, {}).values())
        if heads:
            reused, of = progress.reused_tokens, self._plan.model.num_kv_heads
            # of all heads, payload is of those sent; states, in both, are added below
            dense = self._plan.dense_bytes(progress.prompt_tokens - reused) - self._plan.model.state_bytes
            spared = self._plan.reused_bytes(reused)
            native = progress.draft_bytes + progress.state_bytes  # in both
            spared_draft = self._draft_token_bytes * reused
            self._metrics.succeeded(progress, dense * heads // of + native, spared * heads // of + spared_draft)
        else:
            self._metrics.ended("success")
        # decode knows already: it scattered the last chunk
        self._manager.conclude_transfer(bootstrap_room=room, status=KVPoll.Success, targets=[])

    def abort(self, room: int) -> None:
        """Decode has given up the request."""
        with self._early_lock:
            self._early.pop(room, None)
        if self._manager.request_status.get(room) in (KVPoll.Success, KVPoll.Failed):
            return
        if room in self._senders:
            self._metrics.ended("aborted")
        self._manager.update_status(room, KVPoll.Bootstrapping)
        self._manager.update_status(room, KVPoll.Failed)
        self.bury(room)

    def bury(self, room: int) -> None:
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
