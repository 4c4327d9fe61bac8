"""Decode's end of a transport's stream: it accepts prefill workers and passes their chunks to a `ChunkHandler`."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time

from pdtrim_sglang import threads, vital
from pdtrim_sglang.protocol import HEADER_BYTES, ChunkHeader, ProtocolError, Reply
from pdtrim_sglang.transports.base import ChunkHandler, ReceiveLink, ReceiveMover, TransportConfig
from pdtrim_sglang.transports.handshake import HandshakeError, welcome
from pdtrim_sglang.transports.ring import ReadChunk, Ring
from pdtrim_sglang.transports.sockets import hang_up, prepare, receive, wake

logger = logging.getLogger("sglang.srt.pdtrim.transport")
REFUSAL_SECONDS = 2.0
ACCEPT_AGAIN_SECONDS = 0.1


class _Member:
    """A prefill worker that was let in: its chunks are read in one thread, scattered and answered in another one."""

    def __init__(self, connection: socket.socket, handler: ChunkHandler, config: TransportConfig) -> None:
        self._connection, self._handler = connection, handler
        self._ring = Ring(config)
        self._link: ReceiveLink | None = None
        self._read: queue.SimpleQueue[ReadChunk | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def held_bytes(self) -> int:
        """Of staging memory."""
        return self._ring.held_bytes + (self._link.held_bytes if self._link is not None else 0)

    def connected(self, mover: ReceiveMover) -> None:
        """Its handshake is done."""
        self._link = mover.connected(self._connection)
        self._thread = threads.start("scatter", self._answer)

    def read(self, data: bytes, header: ChunkHeader) -> None:
        """Read a chunk whose lengths were admitted; its rows are scattered, and it is answered, in its turn."""
        assert self._link is not None
        self._read.put(self._ring.read(self._link, data, header))

    def finish(self) -> None:
        """Scatter and answer what was read; no more comes."""
        if self._thread is not None:
            self._read.put(None)
            self._thread.join()

    def close(self) -> None:
        """After `finish`."""
        if self._link is not None:
            self._link.close()

    def _answer(self) -> None:
        lost = False
        while (chunk := self._read.get()) is not None:
            if not lost:
                reply = self._take(chunk)
                try:
                    self._connection.sendall(reply.encode())
                except OSError:  # the reader finds it over; prefill has failed what it had no reply to
                    lost = True
                    wake(self._connection)
            self._ring.free(chunk)

    def _take(self, chunk: ReadChunk) -> Reply:
        room = chunk.header.room
        if not chunk.intact:
            return Reply(room, "checksum mismatch: the chunk was damaged on its way")
        try:
            return self._handler.deliver(chunk.header, chunk.payload, chunk.aux)
        except Exception as error:  # it ends this request: others' chunks come on the same connection
            logger.exception("pdtrim: a chunk was not taken in")
            return Reply(room, f"decode failed: {error}")


class ReceiveServer:
    """Listens at `host` and `port`; two threads and a ring of staging slots a connection."""

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
            try:
                threads.start("connection", self._serve, connection)
            except RuntimeError as error:
                logger.warning("pdtrim: dropping a connection: %s", error)  # out of threads: it may pass
                self._unknown.pop(connection)
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        room, member = 0, _Member(connection, self._handler, self._config)
        try:
            self._let_in(connection, member)
            while data := receive(connection, bytearray(HEADER_BYTES), patient=True):
                header = ChunkHeader.decode(bytes(data))
                room = header.room
                self._handler.admit(header)
                member.read(bytes(data), header)
        except ProtocolError as error:
            logger.warning("pdtrim: dropping a prefill connection: %s", error)
            member.finish()
            with contextlib.suppress(OSError):
                self._refuse(connection, Reply(room, str(error)))
        except HandshakeError as error:
            logger.warning("pdtrim: refusing a connection: %s", error)
        except OSError as error:
            logger.warning("pdtrim: lost a prefill connection: %s", error)
        except Exception as error:  # out of memory while a chunk was read, say: where the next begins is not known
            logger.exception("pdtrim: dropping a prefill connection")
            member.finish()
            with contextlib.suppress(OSError):
                self._refuse(connection, Reply(room, f"decode failed: {error}"))
        finally:
            self._unknown.pop(connection, None)
            self._members.pop(connection, None)
            member.finish()
            member.close()
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
        member.connected(self._mover)

    def _refuse(self, connection: socket.socket, reply: Reply) -> None:
        """Answer, then read on a little: closing with unread bytes would reset the answer away."""
        connection.sendall(reply.encode())
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(REFUSAL_SECONDS)
        unread, waste = self._config.staging_bytes, bytearray(1 << 16)
        while unread > 0 and (count := connection.recv_into(waste)):
            unread -= count
