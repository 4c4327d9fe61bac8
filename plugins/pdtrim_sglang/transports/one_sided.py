"""Transports whose payload is written straight into the decode worker's staging memory (RDMA and the like).

A TCP connection goes beside it, the one of `tcp.py`: it knows its peer by the handshake, and carries header, aux row
and replies. After the handshake the decode worker says where its connection's staging buffer is:

    decode  -> prefill   magic, version, length, place (the writer's own bytes)

For each chunk prefill writes the payload there and waits until that is done, then sends header and aux row. The next
chunk is written when the reply to the last one is there, since a place holds one. The header's checksum covers what
was written, so whatever was written late or by somebody else is found before it is scattered.
"""

from __future__ import annotations

import socket
import struct
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pdtrim_sglang.protocol import ChunkHeader, ProtocolError
from pdtrim_sglang.transports.base import ChannelListener, ChunkHandler, TransportConfig, staging_buffer
from pdtrim_sglang.transports.tcp import TcpReceiveServer, TcpSendChannel, receive

_PLACE = struct.Struct("<4sHI")
MAGIC, VERSION, MOST_PLACE_BYTES = b"PDTP", 1, 1 << 16
ANOTHER = "it speaks another transport; start both workers with one --disaggregation-transfer-backend"


class Writer(ABC):
    """A library that writes into another process's memory; one instance a process and role, used by many threads.

    Its buffers are kept for who comes next and never freed: memory that was made known stays valid, so that a write
    which comes after its connection's end hits nothing else than staging.
    """

    def __init__(self) -> None:
        self._spare: dict[int, list[Tensor]] = {}
        self._spare_lock = threading.Lock()

    def take(self, size: int) -> Tensor:
        """A registered buffer, uint8 `[size]`."""
        with self._spare_lock:
            if self._spare.get(size):
                return self._spare[size].pop()
        buffer = staging_buffer(size)
        self.register(buffer)
        return buffer

    def give(self, buffer: Tensor) -> None:
        """It is no longer used."""
        with self._spare_lock:
            self._spare.setdefault(len(buffer), []).append(buffer)

    @abstractmethod
    def register(self, buffer: Tensor) -> None:
        """Make a buffer (uint8, on the CPU) one that can be written from, and into."""

    @abstractmethod
    def place(self, buffer: Tensor) -> bytes:
        """Decode side: what `reach` of the other process needs to write into a registered buffer."""

    @abstractmethod
    def reach(self, place: bytes) -> Any:
        """Prefill side: the buffer that `place` describes.

        OSError when it cannot be reached; ValueError, LookupError or TypeError when `place` describes none.
        """

    @abstractmethod
    def write(self, source: Tensor, size: int, target: Any, seconds: float) -> None:
        """Write the first `size` bytes of a registered buffer to the beginning of `target`; OSError when it failed."""


class OneSidedSendChannel(TcpSendChannel):
    """As `TcpSendChannel`, with the payload written by `writer`."""

    def __init__(
        self, writer: Writer, host: str, port: int, listener: ChannelListener, config: TransportConfig
    ) -> None:
        super().__init__(host, port, listener, config, writer.take(config.staging_bytes))
        self._writer, self._target = writer, None
        self._place: tuple[socket.socket | None, threading.Event] = (None, threading.Event())  # set: nothing lies in it
        weakref.finalize(self, writer.give, self.staging)

    def _introduced(self, connection: socket.socket) -> None:
        magic, version, length = _PLACE.unpack(receive(connection, bytearray(_PLACE.size)) or bytes(_PLACE.size))
        if magic != MAGIC or version != VERSION or length > MOST_PLACE_BYTES:
            raise OSError(ANOTHER)
        try:
            self._target = self._writer.reach(bytes(receive(connection, bytearray(length)) or b""))
        except (ValueError, LookupError, TypeError):  # the words of another writer
            raise OSError(ANOTHER) from None
        self._place = connection, threading.Event()
        self._answered(connection)

    def _transmit(
        self, connection: socket.socket, header: ChunkHeader, payload: Sequence[memoryview]
    ) -> list[memoryview]:
        seconds, (_, free) = self._config.stall_seconds, self._place
        if not free.wait(seconds):
            raise OSError(f"no answer to the last chunk within {seconds:.0f} s")  # and it hangs up
        if connection is self._broken:
            raise OSError("the connection was lost")
        free.clear()
        at = 0
        for piece in payload:  # the staging buffer itself, or what an engine has packed elsewhere
            if piece.obj is not self._bytes.obj:
                self._bytes[at : at + len(piece)] = piece
            at += len(piece)
        if at:
            self._writer.write(self.staging, at, self._target, seconds)
        return []

    def _answered(self, connection: socket.socket) -> None:
        of, free = self._place
        if of is connection:  # not an old one, whose reader comes late
            free.set()


class OneSidedReceiveServer(TcpReceiveServer):
    """As `TcpReceiveServer`, with the payload in a buffer that prefill has written to."""

    def __init__(self, writer: Writer, host: str, handler: ChunkHandler, config: TransportConfig) -> None:
        self._writer, self._places = writer, dict[socket.socket, Tensor]()
        super().__init__(host, handler, config)

    def _welcomed(self, connection: socket.socket) -> None:
        buffer = self._writer.take(self._config.staging_bytes)
        self._places[connection] = buffer
        self._connections[connection] = len(buffer)
        place = self._writer.place(buffer)
        connection.sendall(_PLACE.pack(MAGIC, VERSION, len(place)) + place)

    def _left(self, connection: socket.socket) -> None:
        super()._left(connection)
        buffer = self._places.pop(connection, None)
        if buffer is not None:
            self._writer.give(buffer)

    def _body(self, connection: socket.socket, header: ChunkHeader) -> tuple[memoryview, memoryview]:
        if header.payload_bytes > self._config.staging_bytes:
            raise ProtocolError(f"chunk of {header.payload_bytes} bytes is larger than the staging buffer")
        own = self._buffer(connection, header.payload_bytes + header.aux_bytes)
        payload, aux = own[: header.payload_bytes], own[header.payload_bytes :]
        if aux and receive(connection, aux) is None:
            raise ConnectionError("closed inside a chunk")
        payload[:] = self._places[connection].numpy().data[: header.payload_bytes]
        return payload, aux
