"""Movers whose payload is written straight into the decode worker's staging memory (RDMA and the like).

The stream carries header, aux row and replies. After the handshake the decode worker says on it where the staging slots
of its connection are:

    decode  -> prefill   magic, version, number of places; of each place its length, then the writer's own bytes

For each chunk prefill writes the payload to the next place in turn, waits until that is done, and sends header and aux
row. A place is written again when the reply to its last chunk is there. The header's checksum covers what was written,
so whatever was written late or by somebody else is found before it is scattered.
"""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
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

_PLACES, _LENGTH = struct.Struct("<4sHH"), struct.Struct("<I")
MAGIC, VERSION, MOST_PLACE_BYTES = b"PDTP", 2, 1 << 16  # 2: several places
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
        super().__init__([writer.take(config.staging_bytes) for _ in range(config.staging_slots)])
        self.writer, self.stall_seconds = writer, config.stall_seconds
        for slot in self.slots:
            weakref.finalize(self, writer.give, slot)

    def connected(self, connection: socket.socket) -> SendLink:
        magic, version, count = _PLACES.unpack(receive(connection, bytearray(_PLACES.size)) or bytes(_PLACES.size))
        if magic != MAGIC or version != VERSION or not count:
            raise OSError(ANOTHER)
        try:
            return _Places(self, [self.writer.reach(_place(connection)) for _ in range(count)])
        except (ValueError, LookupError, TypeError):  # the words of another writer
            raise OSError(ANOTHER) from None


def _place(connection: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(receive(connection, bytearray(_LENGTH.size)) or bytes(_LENGTH.size))
    if length > MOST_PLACE_BYTES:
        raise OSError(ANOTHER)
    return bytes(receive(connection, bytearray(length)) or b"")


class _Places(SendLink):
    """Where one connection writes, in turn. `_free` counts the places in which nothing lies."""

    def __init__(self, mover: OneSidedSendMover, places: Sequence[Any]) -> None:
        self._mover, self._places, self._lost = mover, itertools.cycle(places), False
        self._free = threading.Semaphore(len(places))

    def move(self, slot: int, payload: Sequence[memoryview]) -> Sequence[memoryview]:
        seconds = self._mover.stall_seconds
        if not self._free.acquire(timeout=seconds):
            raise OSError(f"no answer to an earlier chunk within {seconds:.0f} s")  # and it hangs up
        if self._lost:
            raise OSError("the connection was lost")
        source, view, place, size = self._mover.slots[slot], self._mover.views[slot], next(self._places), 0
        for piece in payload:
            if piece.obj is not view.obj and piece:  # an engine has packed it elsewhere
                source[size : size + len(piece)].copy_(torch.frombuffer(piece, dtype=torch.uint8))
            size += len(piece)
        if size:
            self._mover.writer.write(source, size, place, seconds)
        return []

    def answered(self) -> None:
        self._free.release()

    def lost(self) -> None:
        self._lost = True
        self._free.release()


class OneSidedReceiveMover(ReceiveMover):
    """The payload lies in a place that prefill has written to."""

    def __init__(self, writer: Writer, config: TransportConfig) -> None:
        self.writer, self._config = writer, config

    def connected(self, connection: socket.socket) -> ReceiveLink:
        buffers = [self.writer.take(self._config.staging_bytes) for _ in range(self._config.staging_slots)]
        link = _Written(self.writer, buffers, connection)
        try:
            places = [self.writer.place(buffer) for buffer in buffers]
            frames = [part for place in places for part in (_LENGTH.pack(len(place)), place)]
            connection.sendall(b"".join((_PLACES.pack(MAGIC, VERSION, len(places)), *frames)))
        except BaseException:
            link.close()
            raise
        return link


class _Written(ReceiveLink):
    """One connection's places. What lies there is copied before it is checked: a late write may change it after."""

    def __init__(self, writer: Writer, buffers: Sequence[Tensor], connection: socket.socket) -> None:
        self._writer, self._buffers, self._connection = writer, buffers, connection
        self._next, self.held_bytes = itertools.cycle(buffers), sum(map(len, buffers))

    def read(self, header: ChunkHeader, body: Tensor) -> None:
        place, payload, aux = next(self._next), body[: header.payload_bytes], body[header.payload_bytes :]
        if len(payload) > len(place):
            raise ProtocolError(f"chunk of {len(payload)} bytes is larger than a staging slot")
        if len(aux) and receive(self._connection, aux.numpy().data) is None:
            raise ConnectionError("closed inside a chunk")
        payload.copy_(place[: len(payload)])  # torch's copy: other threads of the worker run on meanwhile

    def close(self) -> None:
        for buffer in self._buffers:
            self._writer.give(buffer)
