"""Plain TCP: header, packed rows and aux row leave in one `sendmsg`, and arrive in one buffer."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from torch import Tensor

from pdtrim_sglang.transports.base import (
    Mover,
    ReceiveLink,
    ReceiveMover,
    SendLink,
    SendMover,
    TransportConfig,
    staging_buffer,
)
from pdtrim_sglang.transports.sockets import receive


class Inline(Mover):
    """Payloads go on the stream."""

    def sender(self, host: str, config: TransportConfig) -> SendMover:
        return InlineSendMover(config)

    def receiver(self, host: str, config: TransportConfig) -> ReceiveMover:
        return InlineReceiveMover()


class InlineSendMover(SendMover, SendLink):
    """The payload goes on the stream."""

    def __init__(self, config: TransportConfig) -> None:
        super().__init__([staging_buffer(config.staging_bytes) for _ in range(config.staging_slots)])

    def connected(self, connection: socket.socket) -> SendLink:
        return self

    def move(self, slot: int, size: int, payload: Sequence[memoryview]) -> Sequence[memoryview]:
        return payload

    def answered(self) -> None:
        pass

    def lost(self) -> None:
        pass


class InlineReceiveMover(ReceiveMover):
    """The payload comes on the stream."""

    def connected(self, connection: socket.socket) -> ReceiveLink:
        return _InlineLink(connection)


class _InlineLink(ReceiveLink):
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def read(self, payload: Tensor, aux: Tensor) -> None:
        for part in (payload, aux):
            if len(part) and receive(self._connection, part.numpy().data) is None:
                raise ConnectionError("closed inside a chunk")

    def close(self) -> None:
        pass
