"""Plain TCP: header, packed rows and aux row leave in one `sendmsg`, and arrive in one buffer."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Sequence

import torch

from pdtrim_sglang import threads, vital
from pdtrim_sglang.protocol import HEADER_BYTES, REPLY_BYTES, ChunkHeader, ProtocolError, Reply, body_matches
from pdtrim_sglang.transports.base import (
    ChannelListener,
    ChunkHandler,
    ReceiveServer,
    SendChannel,
    TransportConfig,
    TransportError,
    UnreachableError,
    staging_buffer,
)
from pdtrim_sglang.transports.handshake import HandshakeError, introduce, welcome

logger = logging.getLogger("sglang.srt.pdtrim.tcp")
REFUSAL_SECONDS = 2.0
ACCEPT_AGAIN_SECONDS = 0.1
MOST_PARTS = 1024  # Linux' IOV_MAX: what one sendmsg takes
KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))  # a vanished host: 1 min


class TcpSendChannel(SendChannel):
    """One connection to one decode worker; replies are read by a thread of their own."""

    def __init__(
        self,
        host: str,
        port: int,
        listener: ChannelListener,
        config: TransportConfig,
        staging: torch.Tensor | None = None,
    ) -> None:
        self._address, self._listener, self._config = (host, port), listener, config
        self._socket: socket.socket | None = None
        self._broken: socket.socket | None = None  # set by the reader of that connection
        self.staging = staging_buffer(config.staging_bytes) if staging is None else staging
        self._bytes = memoryview(self.staging.numpy().data)

    def send(self, header: ChunkHeader, aux: memoryview, payload: Sequence[memoryview] | None = None) -> int:
        payload = payload if payload is not None else [self._bytes[: header.payload_bytes]]
        fixed = memoryview(header.encode([*payload, aux]))
        total = len(fixed) + header.payload_bytes + len(aux)
        try:
            connection = self._connected()
        except (OSError, HandshakeError) as error:
            raise UnreachableError(f"cannot reach decode worker {_name(self._address)}: {error}") from error
        try:
            parts = [fixed, *self._transmit(connection, header, payload), aux]
            while parts:
                parts = _after(parts, connection.sendmsg(parts[:MOST_PARTS]))
        except OSError as error:
            self.close()
            raise TransportError(f"cannot send to decode worker {_name(self._address)}: {error}") from error
        return total

    def abandon(self) -> None:
        if (connection := self._socket) is not None:
            _wake(connection)

    def close(self) -> None:
        if self._socket is not None:
            _hang_up(self._socket)
            self._socket = None

    def _introduced(self, connection: socket.socket) -> None:
        """A new connection's ends know each other."""

    def _transmit(
        self, connection: socket.socket, header: ChunkHeader, payload: Sequence[memoryview]
    ) -> Sequence[memoryview]:
        """Move the payload; returns what of it goes between header and aux row."""
        return payload

    def _answered(self, connection: socket.socket) -> None:
        """The peer is done with a chunk, or the connection is lost (then it is `_broken`)."""

    def _connected(self) -> socket.socket:
        if self._socket is None or self._socket is self._broken:
            self._socket = None
            connection = socket.create_connection(self._address, timeout=self._config.connect_seconds)
            _prepare(connection)
            try:
                introduce(connection, self._config.credentials, self._config.connect_seconds)
                self._introduced(connection)
            except BaseException:
                connection.close()
                raise
            connection.settimeout(self._config.stall_seconds)
            self._socket = connection
            threads.start("reader of replies", self._read_replies, connection)
        return self._socket

    def _read_replies(self, connection: socket.socket) -> None:
        reason = "connection closed"
        try:
            while fixed := receive(connection, bytearray(REPLY_BYTES), patient=True):
                room, length = Reply.decode_fixed(bytes(fixed))
                text = receive(connection, bytearray(length)) if length else b""
                self._answered(connection)
                self._listener.on_reply(Reply(room, bytes(text or b"").decode(errors="replace")))
        except (OSError, ProtocolError) as error:
            reason = str(error)
        self._broken = connection
        self._answered(connection)
        _hang_up(connection)
        self._listener.on_lost(f"lost decode worker {_name(self._address)}: {reason}")


class TcpReceiveServer(ReceiveServer):
    """Accepts prefill workers on `host`; one thread and one staging buffer a connection."""

    def __init__(self, host: str, handler: ChunkHandler, config: TransportConfig) -> None:
        self._handler, self._config = handler, config
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, config.port), family=family)
        self.host, self.port = host, self._listener.getsockname()[1]
        self._unknown: dict[socket.socket, None] = {}  # have not shown yet who they are, in the order they came
        self._connections: dict[socket.socket, int] = {}  # members', and the bytes of each one's staging buffer
        self._staging: dict[socket.socket, bytearray] = {}
        vital.start("transport server", self._accept)

    def held(self) -> tuple[int, int]:
        return len(self._connections), sum(list(self._connections.values()))

    def close(self) -> None:
        for waited_on in (self._listener, *list(self._unknown), *list(self._connections)):
            _hang_up(waited_on)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._listener.fileno() < 0:  # closed by us
                    return
                logger.warning("pdtrim: cannot accept a connection: %s", error)  # out of files, say: it may pass
                time.sleep(ACCEPT_AGAIN_SECONDS)
                continue
            self._unknown[connection] = None
            for oldest in list(self._unknown)[: -self._config.connections]:
                logger.warning("pdtrim: dropping a connection: %d came since, and it is silent", len(self._unknown) - 1)
                _wake(oldest)
            threads.start("connection", self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        room = 0
        try:
            _prepare(connection)
            welcome(connection, self._config.credentials, self._config.connect_seconds)
            if len(self._connections) >= self._config.connections:
                raise HandshakeError(f"{self._config.connections} prefill workers are connected already")
            self._connections[connection] = 0
            self._unknown.pop(connection)
            self._handler.connections_changed()
            connection.settimeout(self._config.stall_seconds)
            self._welcomed(connection)
            while data := receive(connection, bytearray(HEADER_BYTES), patient=True):
                header = ChunkHeader.decode(bytes(data))
                room = header.room
                self._handler.admit(header)
                connection.sendall(self._take(connection, bytes(data), header).encode())
        except ProtocolError as error:
            logger.warning("pdtrim: dropping a prefill connection: %s", error)
            with contextlib.suppress(OSError):
                self._refuse(connection, Reply(room, str(error)))
        except HandshakeError as error:
            logger.warning("pdtrim: refusing a connection: %s", error)
        except OSError as error:
            logger.warning("pdtrim: lost a prefill connection: %s", error)
        except Exception as error:  # out of memory while a chunk was read, say: where the next begins is not known
            logger.exception("pdtrim: dropping a prefill connection")
            with contextlib.suppress(OSError):
                self._refuse(connection, Reply(room, f"decode failed: {error}"))
        finally:
            self._unknown.pop(connection, None)
            self._connections.pop(connection, None)
            self._left(connection)
            connection.close()
            self._handler.connections_changed()

    def _refuse(self, connection: socket.socket, reply: Reply) -> None:
        """Answer, then read on a little: closing with unread bytes would reset the answer away."""
        connection.sendall(reply.encode())
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(REFUSAL_SECONDS)
        unread, waste = self._config.staging_bytes, bytearray(1 << 16)
        while unread > 0 and (count := connection.recv_into(waste)):
            unread -= count

    def _welcomed(self, connection: socket.socket) -> None:
        """A new connection's ends know each other."""

    def _left(self, connection: socket.socket) -> None:
        """A connection is over."""
        self._staging.pop(connection, None)

    def _buffer(self, connection: socket.socket, length: int) -> memoryview:
        """The connection's own memory; it grows with the chunks, by doubling up to `staging_bytes`."""
        staging = self._staging.get(connection, bytearray(0))
        if length > len(staging):
            grown = max(length, min(2 * len(staging), self._config.staging_bytes))
            self._connections[connection] += grown - len(staging)
            staging = self._staging[connection] = bytearray(grown)
        return memoryview(staging)[:length]

    def _body(self, connection: socket.socket, header: ChunkHeader) -> tuple[memoryview, memoryview]:
        """Payload and aux row of a chunk whose lengths were admitted; valid until the next one."""
        length = header.payload_bytes + header.aux_bytes
        body = self._buffer(connection, length)
        if length and receive(connection, body) is None:
            raise ConnectionError("closed inside a chunk")
        return body[: header.payload_bytes], body[header.payload_bytes :]

    def _take(self, connection: socket.socket, data: bytes, header: ChunkHeader) -> Reply:
        payload, aux = self._body(connection, header)
        if not body_matches(data, (payload, aux)):
            return Reply(header.room, "checksum mismatch: the chunk was damaged on its way")
        rows = torch.frombuffer(payload, dtype=torch.uint8) if len(payload) else torch.empty(0, dtype=torch.uint8)
        try:
            return self._handler.deliver(header, rows, aux)
        except Exception as error:  # it ends this request: others' chunks come on the same connection
            logger.exception("pdtrim: a chunk was not taken in")
            return Reply(header.room, f"decode failed: {error}")


def _prepare(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _wake(connection: socket.socket) -> None:
    """The thread that waits on it finds it over."""
    with contextlib.suppress(OSError):  # closed meanwhile
        connection.shutdown(socket.SHUT_RDWR)


def _hang_up(connection: socket.socket) -> None:
    _wake(connection)
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


def _after(parts: list[memoryview], sent: int) -> list[memoryview]:
    """What of `parts` is left when `sent` bytes of them are gone."""
    left = []
    for part in parts:
        if sent < len(part):
            left.append(part[sent:])
        sent = max(0, sent - len(part))
    return left


def _name(address: tuple[str, int]) -> str:
    return f"{address[0]}:{address[1]}"
