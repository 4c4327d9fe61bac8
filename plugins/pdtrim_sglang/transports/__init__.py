"""What moves packed KV between two workers. To add one: a file here, a name in `TRANSPORTS`."""

from __future__ import annotations

from collections.abc import Callable

from pdtrim_sglang.transports.base import ReceiveServer, SendChannel, TransportConfig
from pdtrim_sglang.transports.tcp import TcpReceiveServer, TcpSendChannel

__all__ = ["TRANSPORTS", "ReceiveServer", "SendChannel", "TransportConfig", "transport_named"]

TRANSPORTS: dict[str, tuple[Callable[..., SendChannel], Callable[..., ReceiveServer]]] = {
    "tcp": (TcpSendChannel, TcpReceiveServer),
}


def transport_named(name: str) -> tuple[Callable[..., SendChannel], Callable[..., ReceiveServer]]:
    """Channel and server classes of a transport; ValueError lists the valid names."""
    if name not in TRANSPORTS:
        raise ValueError(f"no transport {name!r}; valid: {', '.join(sorted(TRANSPORTS))}")
    return TRANSPORTS[name]
