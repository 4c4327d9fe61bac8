"""What moves packed KV between two workers. To add one: a file here, a name in `TRANSPORTS`."""

from __future__ import annotations

from collections.abc import Callable

from pdtrim_sglang.transports.base import ReceiveServer, SendChannel, TransportConfig
from pdtrim_sglang.transports.mooncake import MooncakeReceiveServer, MooncakeSendChannel
from pdtrim_sglang.transports.nixl import NixlReceiveServer, NixlSendChannel
from pdtrim_sglang.transports.tcp import TcpReceiveServer, TcpSendChannel

Ends = tuple[type[SendChannel], Callable[..., ReceiveServer]]
__all__ = ["TRANSPORTS", "ReceiveServer", "SendChannel", "TransportConfig", "transport_named"]

# Ends are made with (host, port, listener, config) and (host, handler, config); libraries load when an end is made.
TRANSPORTS: dict[str, Ends] = {
    "tcp": (TcpSendChannel, TcpReceiveServer),
    "nixl": (NixlSendChannel, NixlReceiveServer),
    "mooncake": (MooncakeSendChannel, MooncakeReceiveServer),
}


def transport_named(name: str) -> Ends:
    """Channel and server classes of a transport; ValueError lists the valid names."""
    if name not in TRANSPORTS:
        raise ValueError(f"no transport {name!r}; valid: {', '.join(sorted(TRANSPORTS))}")
    return TRANSPORTS[name]
