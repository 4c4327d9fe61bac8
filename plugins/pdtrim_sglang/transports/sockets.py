"""What both ends do with a TCP connection."""

from __future__ import annotations

import contextlib
import socket

KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))  # a vanished host: 1 min
MOST_PARTS = 1024  # Linux' IOV_MAX: what one sendmsg takes


def prepare(connection: socket.socket) -> None:
    """Send at once, and notice a host that has vanished."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def wake(connection: socket.socket) -> None:
    """The thread that waits on it finds it over."""
    with contextlib.suppress(OSError):  # closed meanwhile
        connection.shutdown(socket.SHUT_RDWR)


def hang_up(connection: socket.socket) -> None:
    """Wake who waits on it, and close it."""
    wake(connection)
    connection.close()


def receive(
    connection: socket.socket, into: bytearray | memoryview, patient: bool = False
) -> bytearray | memoryview | None:
    """Fill `into`; None when the peer closed before the first byte. A patient read waits for that byte forever."""
    view, done = memoryview(into), 0
    while done < len(view):
        try:
            count = connection.recv_into(view[done:])
        except TimeoutError:
            if patient and not done:
                continue
            raise
        if not count:
            if done:
                raise ConnectionError("closed inside a frame")
            return None
        done += count
    return into


def send(connection: socket.socket, parts: list[memoryview]) -> None:
    """Send all parts, as few calls as can be."""
    while parts:
        parts = _after(parts, connection.sendmsg(parts[:MOST_PARTS]))


def _after(parts: list[memoryview], sent: int) -> list[memoryview]:
    """What of `parts` is left when `sent` bytes of them are gone."""
    left = []
    for part in parts:
        if sent < len(part):
            left.append(part[sent:])
        sent = max(0, sent - len(part))
    return left
