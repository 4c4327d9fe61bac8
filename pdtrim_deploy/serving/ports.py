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
    with contextlib.suppress(OSError):
        _bind(port)
        return True
    return False


def _bind(port: int) -> None:
    """Bind and let go; OSError as a server would have it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))


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
    try:
        _bind(port)
    except PermissionError:
        raise UserError(
            f"{option} {port}: this user may not listen on it; choose 1024 or more, or leave it out"
        ) from None
    except OSError:
        raise UserError(
            f"{option} {port}: another program listens on this port; choose another or leave it out"
        ) from None
    return port
