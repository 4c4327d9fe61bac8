"""A TCP proxy between the prefill worker's transport and the decode worker's, that can do what networks do."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator

INTRODUCTION = 102  # bytes from prefill until it is let in (pdtrim_sglang.transports.handshake)
DELAY_S = 0.3


class Proxy:
    """Forwards `port` to `target` on loopback. `fault` concerns bytes from prefill to decode:

    `drop`: none arrives; `hole`: 100 of them are missing; `delay`: each read waits; `corrupt`: a bit flips in each
    chunk; `truncate`: the connection ends inside a chunk; `cut`: connections end at once; `none`.
    """

    def __init__(self, port: int, target: int, seed: int = 0) -> None:
        self.fault, self.hits = "none", 0
        self._target, self._dice = target, random.Random(seed)
        self._lock, self._open = threading.Lock(), set[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, daemon=True).start()

    @contextlib.contextmanager
    def doing(self, fault: str) -> Iterator[None]:
        """`with proxy.doing("drop"):`; connections made before are concerned too."""
        self.fault, self.hits = fault, 0
        try:
            yield
        finally:
            self.fault = "none"

    @property
    def connections(self) -> int:
        """Those of prefill that are open now."""
        return len(self._open) // 2

    def close(self) -> None:
        """Stop."""
        self._listener.close()
        for end in list(self._open):
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._open |= {near, far}
            threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, forward: bool) -> None:
        carried = 0
        try:
            while data := source.recv(1 << 16):
                # the first bytes are the handshake's: the fault is in what follows
                whole, ends = self._harmed(data) if forward and carried >= INTRODUCTION else (data, False)
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

    def _harmed(self, data: bytes) -> tuple[bytes, bool]:
        """What is passed on, and whether the connection ends then."""
        fault, middle = self.fault, len(data) // 2
        self.hits += fault != "none"
        if fault == "corrupt":
            at = self._dice.randrange(len(data))
            return data[:at] + bytes([data[at] ^ 1 << self._dice.randrange(8)]) + data[at + 1 :], False
        if fault == "delay":
            time.sleep(DELAY_S)
        return {
            "none": (data, False),
            "delay": (data, False),
            "drop": (b"", False),
            "hole": (data[:middle] + data[middle + 100 :], False),
            "truncate": (data[:middle], True),
            "cut": (b"", True),
        }[fault]
