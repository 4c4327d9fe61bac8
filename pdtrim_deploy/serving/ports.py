"""Free TCP ports on the loopback interface."""

from __future__ import annotations

import contextlib
import random
import socket

from pdtrim_deploy.errors import UserError

HOST = "127.0.0.1"
# Below Linux's ephemeral range (32768...), so that no outgoing connection takes one before its server binds it.
FIRST, LAST = 20000, 32000


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return True
    return False


def free_ports(count: int, taken: frozenset[int] = frozenset()) -> list[int]:
    """`count` different free ports, none of `taken`, from a random place so that clusters started at once differ."""
    ports: list[int] = []
    for port in random.sample(range(FIRST, LAST), LAST - FIRST):
        if len(ports) == count:
            break
        if port not in taken and is_free(port):
            ports.append(port)
    return ports


def require_free(port: int, option: str) -> int:
    """`port` itself, or a UserError that names the option it came from."""
    if not is_free(port):
        raise UserError(f"{option} {port}: another program listens on this port; choose another or leave it out")
    return port
