"""A TCP relay on loopback, between prefill's transport and decode's: what stands for a slower link."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan.link import Link
from pdtrim_deploy.serving.ports import HOST

MOST_BITS_PER_S = 1e9  # beyond, Python itself is what holds bytes back
READ_BYTES = 1 << 16
SLACK_S = 0.005  # what a sleep that took too long may be made up for: the depth of the token bucket, in time


def relayed_link(text: str, most_bits_per_s: float = MOST_BITS_PER_S) -> Link:
    """`--link TEXT`; UserError for what is no speed, and for one that a relay cannot stand for."""
    link = Link.parse(text)
    if link.bits_per_s > most_bits_per_s:
        raise UserError(
            f"--link {text}: links faster than {Link(most_bits_per_s)} cannot be had this way, the relay itself ends "
            f"there; give a slower one, or leave it out"
        )
    return link


class Relay:
    """Forwards `port` to `target` until it is closed; subclasses say what happens to bytes on their way there."""

    def __init__(self, port: int, target: int) -> None:
        self._target = target
        self._lock, self._open = threading.Lock(), set[socket.socket]()
        self._listener = socket.create_server((HOST, port))
        threading.Thread(target=self._accept, daemon=True).start()

    def passed(self, data: bytes, carried: int) -> tuple[bytes, bool]:
        """What of `data` goes on to the target, after `carried` bytes of its connection; whether that ends then."""
        return data, False

    def close(self) -> None:
        """Stop."""
        for end in (self._listener, *list(self._open)):
            with contextlib.suppress(OSError):  # wakes the thread that waits on it
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection((HOST, self._target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open |= {near, far}
            threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, forward: bool) -> None:
        carried = 0
        try:
            while data := source.recv(READ_BYTES):
                whole, ends = self.passed(data, carried) if forward else (data, False)
                carried += len(data)
                sink.sendall(whole)
                if ends:
                    break
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            with self._lock:
                if source in self._open:
                    self._open -= {source, sink}
                    source.close()
                    sink.close()


class Throttle(Relay):
    """A link of `bytes_per_s` to the target, shared by all connections; the way back is free."""

    def __init__(self, port: int, target: int, bytes_per_s: float) -> None:
        self._bytes_per_s, self._free_at, self._turn = bytes_per_s, 0.0, threading.Lock()
        super().__init__(port, target)

    def passed(self, data: bytes, carried: int) -> tuple[bytes, bool]:
        """All of it, when the link would have carried it."""
        with self._turn:
            self._free_at = max(self._free_at, time.monotonic() - SLACK_S) + len(data) / self._bytes_per_s
            arrives = self._free_at
        time.sleep(max(0.0, arrives - time.monotonic()))
        return data, False
