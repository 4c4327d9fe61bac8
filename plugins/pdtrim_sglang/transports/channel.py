"""Prefill's end of a transport's stream: one connection to one decode worker, made anew when it broke."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from torch import Tensor

from pdtrim_sglang import threads
from pdtrim_sglang.protocol import REPLY_BYTES, ChunkHeader, ProtocolError, Reply
from pdtrim_sglang.transports.base import (
    ChannelListener,
    SendLink,
    SendMover,
    TransportConfig,
    TransportError,
    UnreachableError,
    log_unforeseen,
)
from pdtrim_sglang.transports.handshake import introduce
from pdtrim_sglang.transports.sockets import hang_up, prepare, receive, send, wake


class _Connection:
    """`broken` is set by the thread that reads its replies."""

    def __init__(self, socket_: socket.socket, link: SendLink) -> None:
        self.socket, self.link, self.broken = socket_, link, False


class SendChannel:
    """Sends chunks to one decode worker, in order; owned by one thread. Replies are read by a thread of their own."""

    def __init__(
        self, host: str, port: int, listener: ChannelListener, config: TransportConfig, mover: SendMover
    ) -> None:
        self._address, self._name = (host, port), f"{host}:{port}"
        self._listener, self._config, self._mover = listener, config, mover
        self._connection: _Connection | None = None

    @property
    def slots(self) -> tuple[Tensor, ...]:
        """The uint8 buffers `[staging_bytes]` that payloads are packed into."""
        return self._mover.slots

    def connect(self) -> None:
        """Connect unless it is; UnreachableError when it cannot."""
        self._reached()

    def send(
        self,
        header: ChunkHeader,
        aux: memoryview,
        slot: int = 0,
        payload: Sequence[memoryview] | None = None,
        device_sum: bytes | None = None,
    ) -> int:
        """Send a payload and `aux`; all memory may be reused when this returns.

        Args:
            slot: number of the slot that the payload lies in.
            payload: its pieces in order, `header.payload_bytes` together, where not all of them lie in the slot.
            device_sum: the checksum of a payload in a slot on a GPU, which the host does not read.

        Returns:
            bytes put on the wire, header included.

        Raises:
            TransportError: not connected, or the connection broke. The next `send` connects anew.

        """
        size = header.payload_bytes
        if device_sum is not None:
            payload = []
        elif payload is None:
            payload = [self._mover.views[slot][:size]]
        fixed = memoryview(header.encode([*(payload if device_sum is None else [device_sum]), aux]))
        connection = self._reached()
        try:
            send(connection.socket, [fixed, *connection.link.move(slot, size, payload), aux])
        except Exception as error:  # of a library, too: both ends count chunks, and where the next begins is not known
            self.close()
            log_unforeseen(error)
            raise TransportError(f"cannot send to decode worker {self._name}: {error}") from error
        return len(fixed) + size + len(aux)

    def abandon(self) -> None:
        """From any thread: the connection has gone silent. Break it, so that its owner hears `on_lost`."""
        if (connection := self._connection) is not None:
            wake(connection.socket)

    def close(self) -> None:
        """Drop the connection."""
        if self._connection is not None:
            hang_up(self._connection.socket)
            self._connection = None

    def _reached(self) -> _Connection:
        try:
            return self._connected()
        except Exception as error:  # OSError, HandshakeError; UnicodeError: no host can have this name; out of threads
            log_unforeseen(error)
            raise UnreachableError(f"cannot reach decode worker {self._name}: {error}") from error

    def _connected(self) -> _Connection:
        if self._connection is None or self._connection.broken:
            self._connection = None
            stream = socket.create_connection(self._address, timeout=self._config.connect_seconds)
            prepare(stream)
            try:
                introduce(stream, self._config.credentials, self._config.connect_seconds)
                connection = _Connection(stream, self._mover.connected(stream))
                stream.settimeout(self._config.stall_seconds)
                threads.start("reader of replies", self._read_replies, connection)
            except BaseException:
                stream.close()
                raise
            self._connection = connection
        return self._connection

    def _read_replies(self, connection: _Connection) -> None:
        stream, reason = connection.socket, "connection closed"
        try:
            while fixed := receive(stream, bytearray(REPLY_BYTES), patient=True):
                room, length = Reply.decode_fixed(bytes(fixed))
                if (text := receive(stream, bytearray(length))) is None:  # what is left would be the reply of success
                    raise ConnectionError("closed inside a reply")
                connection.link.answered()
                self._listener.on_reply(Reply(room, bytes(text).decode(errors="replace")))
        except (OSError, ProtocolError) as error:
            reason = str(error)
        connection.broken = True
        connection.link.lost()
        hang_up(stream)
        self._listener.on_lost(f"lost decode worker {self._name}: {reason}")
