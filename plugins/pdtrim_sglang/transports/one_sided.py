"""Movers whose payload is written straight into the decode worker's staging memory (RDMA and the like).

The stream carries header, aux row and replies. After the handshake the decode worker says on it where its connection's
staging buffer is:

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
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pdtrim_sglang.protocol import ChunkHeader, ProtocolError
from pdtrim_sglang.transports.base import (
    Mover,
    ReceiveLink,
    ReceiveMover,
    SendLink,
    SendMover,
    TransportConfig,
    own_address,
    staging_buffer,
)
from pdtrim_sglang.transports.sockets import receive

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


class OneSided(Mover):
    """Payloads are written by a library, whose `Writer` of a role (`send`, `receive`) at an address `writer` gives."""

    def __init__(self, writer: Callable[[str, str, TransportConfig], Writer]) -> None:
        self._writer = writer

    def prepare(self, local_host: str, config: TransportConfig) -> None:
        self._writer("send", local_host, config)

    def sender(self, host: str, config: TransportConfig) -> SendMover:
        return OneSidedSendMover(self._writer("send", own_address(host), config), config)

    def receiver(self, host: str, config: TransportConfig) -> ReceiveMover:
        return OneSidedReceiveMover(self._writer("receive", host, config), config)


class OneSidedSendMover(SendMover):
    """The payload is written by `writer`."""

    def __init__(self, writer: Writer, config: TransportConfig) -> None:
        super().__init__(writer.take(config.staging_bytes))
        self.writer, self.stall_seconds = writer, config.stall_seconds
        weakref.finalize(self, writer.give, self.staging)

    def connected(self, connection: socket.socket) -> SendLink:
        magic, version, length = _PLACE.unpack(receive(connection, bytearray(_PLACE.size)) or bytes(_PLACE.size))
        if magic != MAGIC or version != VERSION or length > MOST_PLACE_BYTES:
            raise OSError(ANOTHER)
        try:
            target = self.writer.reach(bytes(receive(connection, bytearray(length)) or b""))
        except (ValueError, LookupError, TypeError):  # the words of another writer
            raise OSError(ANOTHER) from None
        return _Target(self, target)


class _Target(SendLink):
    """One connection's place in the decode worker's memory; `_free` is set when nothing lies in it."""

    def __init__(self, mover: OneSidedSendMover, target: Any) -> None:
        self._mover, self._target, self._lost = mover, target, False
        self._free = threading.Event()
        self._free.set()

    def move(self, payload: Sequence[memoryview]) -> Sequence[memoryview]:
        seconds, staging = self._mover.stall_seconds, self._mover.staging_view
        if not self._free.wait(seconds):
            raise OSError(f"no answer to the last chunk within {seconds:.0f} s")  # and it hangs up
        if self._lost:
            raise OSError("the connection was lost")
        self._free.clear()
        at = 0
        for piece in payload:  # the staging buffer itself, or what an engine has packed elsewhere
            if piece.obj is not staging.obj:
                staging[at : at + len(piece)] = piece
            at += len(piece)
        if at:
            self._mover.writer.write(self._mover.staging, at, self._target, seconds)
        return []

    def answered(self) -> None:
        self._free.set()

    def lost(self) -> None:
        self._lost = True
        self._free.set()


class OneSidedReceiveMover(ReceiveMover):
    """The payload lies in a buffer that prefill has written to."""

    def __init__(self, writer: Writer, config: TransportConfig) -> None:
        self.writer, self._staging_bytes = writer, config.staging_bytes

    def connected(self, connection: socket.socket) -> ReceiveLink:
        link = Place(self.writer, self.writer.take(self._staging_bytes), connection)
        try:
            place = self.writer.place(link.buffer)
            connection.sendall(_PLACE.pack(MAGIC, VERSION, len(place)) + place)
        except BaseException:
            link.close()
            raise
        return link


class Place(ReceiveLink):
    """One connection's buffer."""

    def __init__(self, writer: Writer, buffer: Tensor, connection: socket.socket) -> None:
        self._writer, self._connection = writer, connection
        self.buffer, self.held_bytes = buffer, len(buffer)

    def read(self, header: ChunkHeader, body: memoryview) -> None:
        if header.payload_bytes > len(self.buffer):
            raise ProtocolError(f"chunk of {header.payload_bytes} bytes is larger than the staging buffer")
        payload, aux = body[: header.payload_bytes], body[header.payload_bytes :]
        if aux and receive(self._connection, aux) is None:
            raise ConnectionError("closed inside a chunk")
        payload[:] = self.buffer.numpy().data[: header.payload_bytes]

    def close(self) -> None:
        self._writer.give(self.buffer)
