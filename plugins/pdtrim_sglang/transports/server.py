"""Decode's end of a transport's stream: it accepts prefill workers and passes their chunks to a `ChunkHandler`."""

from __future__ import annotations

import contextlib
import logging
import socket
import time

import torch

from pdtrim_sglang import threads, vital
from pdtrim_sglang.protocol import HEADER_BYTES, ChunkHeader, ProtocolError, Reply, body_matches
from pdtrim_sglang.transports.base import ChunkHandler, ReceiveLink, ReceiveMover, TransportConfig
from pdtrim_sglang.transports.handshake import HandshakeError, welcome
from pdtrim_sglang.transports.sockets import hang_up, prepare, receive, wake

logger = logging.getLogger("sglang.srt.pdtrim.transport")
REFUSAL_SECONDS = 2.0
ACCEPT_AGAIN_SECONDS = 0.1


class _Member:
    """A prefill worker that was let in, with the memory that its chunks are read into."""

    def __init__(self, most_bytes: int) -> None:
        self.link: ReceiveLink | None = None
        self._most_bytes, self._staging = most_bytes, bytearray(0)

    @property
    def held_bytes(self) -> int:
        return len(self._staging) + (self.link.held_bytes if self.link is not None else 0)

    def body(self, header: ChunkHeader) -> tuple[memoryview, memoryview]:
        """Payload and aux row of a chunk whose lengths were admitted; valid until the next one."""
        assert self.link is not None
        body = self._room(header.payload_bytes + header.aux_bytes)
        self.link.read(header, body)
        return body[: header.payload_bytes], body[header.payload_bytes :]

    def _room(self, length: int) -> memoryview:
        """Memory that grows with the chunks, by doubling up to `most_bytes`."""
        if length > len(self._staging):
            self._staging = bytearray(max(length, min(2 * len(self._staging), self._most_bytes)))
        return memoryview(self._staging)[:length]


class ReceiveServer:
    """Listens at `host` and `port`; one thread and one staging buffer a connection."""

    def __init__(self, host: str, handler: ChunkHandler, config: TransportConfig, mover: ReceiveMover) -> None:
        self._handler, self._config, self._mover = handler, config, mover
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, config.port), family=family)
        self.host, self.port = host, int(self._listener.getsockname()[1])
        self._unknown: dict[socket.socket, None] = {}  # have not shown yet who they are, in the order they came
        self._members: dict[socket.socket, _Member] = {}
        vital.start("transport server", self._accept)

    def held(self) -> tuple[int, int]:
        """Connections that are open, and bytes of staging memory that they hold."""
        members = list(self._members.values())
        return len(members), sum(member.held_bytes for member in members)

    def close(self) -> None:
        """Stop accepting and drop all connections."""
        for waited_on in (self._listener, *list(self._unknown), *list(self._members)):
            hang_up(waited_on)

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
                wake(oldest)
            threads.start("connection", self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        room, member = 0, _Member(self._config.staging_bytes)
        try:
            self._let_in(connection, member)
            while data := receive(connection, bytearray(HEADER_BYTES), patient=True):
                header = ChunkHeader.decode(bytes(data))
                room = header.room
                self._handler.admit(header)
                connection.sendall(self._take(member, bytes(data), header).encode())
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
            self._members.pop(connection, None)
            if member.link is not None:
                member.link.close()
            connection.close()
            self._handler.connections_changed()

    def _let_in(self, connection: socket.socket, member: _Member) -> None:
        prepare(connection)
        welcome(connection, self._config.credentials, self._config.connect_seconds)
        if len(self._members) >= self._config.connections:
            raise HandshakeError(f"{self._config.connections} prefill workers are connected already")
        self._members[connection] = member
        self._unknown.pop(connection)
        self._handler.connections_changed()
        connection.settimeout(self._config.stall_seconds)
        member.link = self._mover.connected(connection)

    def _refuse(self, connection: socket.socket, reply: Reply) -> None:
        """Answer, then read on a little: closing with unread bytes would reset the answer away."""
        connection.sendall(reply.encode())
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(REFUSAL_SECONDS)
        unread, waste = self._config.staging_bytes, bytearray(1 << 16)
        while unread > 0 and (count := connection.recv_into(waste)):
            unread -= count

    def _take(self, member: _Member, data: bytes, header: ChunkHeader) -> Reply:
        payload, aux = member.body(header)
        if not body_matches(data, (payload, aux)):
            return Reply(header.room, "checksum mismatch: the chunk was damaged on its way")
        rows = torch.frombuffer(payload, dtype=torch.uint8) if len(payload) else torch.empty(0, dtype=torch.uint8)
        try:
            return self._handler.deliver(header, rows, aux)
        except Exception as error:  # it ends this request: others' chunks come on the same connection
            logger.exception("pdtrim: a chunk was not taken in")
            return Reply(header.room, f"decode failed: {error}")
