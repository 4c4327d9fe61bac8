"""Decode workers as a prefill worker knows them: who has registered, who was refused, and a peer for each.

A session is one rank of a running decode worker. What is kept for it ends when its connection is lost; one that comes
again gets it anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from pdtrim_sglang.messages import UNREGISTERED, Register
from pdtrim_sglang.pairing import RoomInfo
from pdtrim_sglang.peer import Chunk, Peer
from pdtrim_sglang.transports.base import log_unforeseen

MOST_REMEMBERED = 10_000


class Sessions:
    """Registrations, refusals and peers by session; `make_peer` connects to the decode worker that registered."""

    def __init__(self, make_peer: Callable[[Register], Peer]) -> None:
        self._make_peer = make_peer
        self._known: dict[str, Register] = {}
        self._rejected: dict[str, str] = {}
        self._peers: dict[str, Peer] = {}
        self._lock = threading.Lock()  # over the registrations and the peers

    def __len__(self) -> int:
        """Decode workers that something is kept for."""
        return len(self._peers)

    def register(self, message: Register) -> str:
        """A decode worker that can be served; returns why it cannot be sent to now, in one sentence, or nothing."""
        self._rejected.pop(message.session, None)
        with self._lock:
            _remember(self._known, message.session, message)
        return self.prepared(message.session)

    def reject(self, message: Register, reason: str) -> None:
        """A decode worker that cannot be served: its requests fail with `reason`."""
        _remember(self._rejected, message.session, reason)

    def renewed(self, session: str) -> Register | None:
        """The registration of a decode worker that has just been heard of; None when there is none."""
        with self._lock:
            if (decode := self._known.get(session)) is not None:
                _remember(self._known, session, decode)
        return decode

    def registration(self, session: str) -> Register | None:
        """The registration of a decode worker; None when there is none."""
        return self._known.get(session)

    def refusal(self, session: str) -> str:
        """Why a decode worker cannot be sent to, in one sentence, or nothing: then it has a peer."""
        return self._rejected.get(session) or self.prepared(session)

    def prepared(self, session: str) -> str:
        """Have a peer for a decode worker that has registered; why there can be none, in one sentence, or nothing.

        The control thread calls it when a worker registers and when it opens a room, since pinned memory takes tens of
        milliseconds to make and to register: the scheduler seldom has to.
        """
        with self._lock:
            known = self._known.get(session)
            if known is None:
                return f"decode worker {session} {UNREGISTERED}"
            if session in self._peers:
                return ""
        try:
            peer = self._make_peer(known)
        except Exception as error:  # memory that cannot be registered must end neither scheduler nor control thread
            log_unforeseen(error)
            return f"cannot prepare to send to decode worker {session}: {error}"
        with self._lock:
            if self._peers.setdefault(session, peer) is not peer:
                peer.close()
        return ""

    def submit(self, info: RoomInfo, parts: Iterable[Chunk]) -> str:
        """Queue a chunk's parts to one rank of decode; returns why not, or nothing."""
        with_heads = [replace(part, heads=info.heads, carries_aux=info.carries_aux) for part in parts]
        while not (reason := self.prepared(info.session)):
            with self._lock:
                if (peer := self._peers.get(info.session)) is None:  # it was swept away just now
                    continue
                for part in with_heads:
                    peer.submit(part)
                return ""
        return reason

    def awaited(self, room: int, sessions: Iterable[str]) -> list[Peer]:
        """Peers of those sessions that have not acknowledged all of the room's rows sent to them."""
        return [peer for peer in map(self._peers.get, sessions) if peer is not None and peer.awaits(room)]

    def forget(self, room: int) -> None:
        """The scheduler is done with this room: nobody waits for its replies."""
        for peer in list(self._peers.values()):  # of a prompt aborted between its chunks no reply is outstanding
            peer.forget(room)

    def sweep(self) -> None:
        """End what is kept for decode workers whose connections are lost."""
        with self._lock:
            for session in [session for session, peer in self._peers.items() if peer.gone]:
                self._peers.pop(session).close()


def _remember(sessions: dict[str, Any], session: str, status: Any) -> None:
    """Keep the last status of a session. A restarted decode worker is a new session, so the oldest ones are dropped."""
    sessions.pop(session, None)
    sessions[session] = status
    if len(sessions) > MOST_REMEMBERED:
        del sessions[next(iter(sessions))]
