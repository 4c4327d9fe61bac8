"""Movers whose payload is written straight into the decode worker's staging memory (RDMA and the like).

The stream carries header, aux row and replies. After the handshake the decode worker says on it where the staging slots
of its connection are:

    decode  -> prefill   magic, version, whether the places are on a GPU, their number;
                         of each place its length, then the writer's own bytes

For each chunk prefill writes the payload to the next place in turn, waits until that is done, and sends header and aux
row. A place is written again when the reply to its last chunk is there. The header's checksum covers what was written,
so whatever was written late or by somebody else is found before it is scattered.

Slots and places lie on the host, or both on GPUs: packing, writing, checking and scattering then leave the bytes there.
The host waits for the event behind packing and checksum before it has them written. What arrived is copied to another
slot on that GPU, whose checksum decides: nothing else is scattered. The library's own checks do not cover this: they
end at the network device, and know nothing of a write that came late or was meant for another place.
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

from pdtrim_sglang.protocol import ProtocolError
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

_PLACES, _LENGTH = struct.Struct("<4sHHH"), struct.Struct("<I")
MAGIC, VERSION, MOST_PLACE_BYTES = b"PDTP", 3, 1 << 16  # 2: several places; 3: on the host or on a GPU
HOST = torch.device("cpu")
ANOTHER = "it speaks another transport; start both workers with one --disaggregation-transfer-backend"


class Writer(ABC):
    """A library that writes into another process's memory; one instance a process and role, used by many threads.

    Its buffers are kept for who comes next and never freed: memory that was made known stays valid, so that a write
    which comes after its connection's end hits nothing else than staging.
    """

    def __init__(self) -> None:
        self._spare: dict[tuple[int, torch.device], list[Tensor]] = {}
        self._spare_lock = threading.Lock()

    def take(self, size: int, device: torch.device | None = None) -> Tensor:
        """A registered buffer, uint8 `[size]`, on `device` or the host."""
        with self._spare_lock:
            if spare := self._spare.get((size, device or HOST)):
                return spare.pop()
        buffer = staging_buffer(size, device)
        self.register(buffer)
        return buffer

    def ring(self, config: TransportConfig) -> list[Tensor]:
        """Buffers for the slots of one connection."""
        buffers = list[Tensor]()
        try:
            for _ in range(config.staging_slots):
                buffers.append(self.take(config.staging_bytes, config.device))
        except BaseException:  # out of memory, say: those that are registered stay so
            for buffer in buffers:
                self.give(buffer)
            raise
        return buffers

    def try_device(self, config: TransportConfig) -> None:
        """RuntimeError, one sentence, when slots of `config` are to be on a GPU whose memory cannot be registered."""
        if config.device is None:
            return
        try:
            for buffer in self.ring(config):
                self.give(buffer)
        except Exception as error:  # of the library, or out of the GPU's memory
            raise RuntimeError(
                f"pdtrim: staging slots cannot be registered on {config.device} ({error}); give both workers "
                "--transport-option slots=host"
            ) from error

    def give(self, buffer: Tensor) -> None:
        """It is no longer used."""
        with self._spare_lock:
            self._spare.setdefault((len(buffer), buffer.device), []).append(buffer)

    @abstractmethod
    def register(self, buffer: Tensor) -> None:
        """Make a buffer (uint8, on the host or on a GPU) one that can be written from, and into."""

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
    """Payloads are written by a library, whose `Writer` of a role (`send`, `receive`) at an address `writer` gives.

    `refuses_device` and `on_device` as of `Mover`.
    """

    def __init__(
        self,
        writer: Callable[[str, str, TransportConfig], Writer],
        refuses_device: Callable[[], str] = str,
        on_device: bool = True,
    ) -> None:
        self._writer, self._refuses_device, self.on_device = writer, refuses_device, on_device

    def refuses_device(self) -> str:
        return self._refuses_device()

    def prepare(self, local_host: str, config: TransportConfig) -> None:
        self._writer("send", local_host, config).try_device(config)

    def sender(self, host: str, config: TransportConfig) -> SendMover:
        return OneSidedSendMover(self._writer("send", own_address(host), config), config)

    def receiver(self, host: str, config: TransportConfig) -> ReceiveMover:
        return OneSidedReceiveMover(self._writer("receive", host, config), config)


class OneSidedSendMover(SendMover):
    """The payload is written by `writer`."""

    def __init__(self, writer: Writer, config: TransportConfig) -> None:
        super().__init__(writer.ring(config))
        self.writer, self.stall_seconds, self.on_device = writer, config.stall_seconds, config.device is not None
        for slot in self.slots:
            weakref.finalize(self, writer.give, slot)

    def connected(self, connection: socket.socket) -> SendLink:
        fixed = receive(connection, bytearray(_PLACES.size)) or bytes(_PLACES.size)
        magic, version, on_device, count = _PLACES.unpack(fixed)
        if magic != MAGIC or version != VERSION or not count:
            raise OSError(ANOTHER)
        if on_device != self.on_device:
            peer_memory, memory = (
                ("a GPU's memory" if on_gpu else "host memory") for on_gpu in (on_device, self.on_device)
            )
            raise OSError(
                f"its staging slots are in {peer_memory}, this worker's in {memory}; start both workers with one "
                "--transport-option slots=host, or slots=device where both have a GPU"
            )
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

    def move(self, slot: int, size: int, payload: Sequence[memoryview]) -> Sequence[memoryview]:
        seconds = self._mover.stall_seconds
        if not self._free.acquire(timeout=seconds):
            raise OSError(f"no answer to an earlier chunk within {seconds:.0f} s")  # and it hangs up
        if self._lost:
            raise OSError("the connection was lost")
        source, place, start = self._mover.slots[slot], next(self._places), 0
        for piece in payload:
            if piece.obj is not self._mover.views[slot].obj and piece:  # an engine has packed it elsewhere
                source[start : start + len(piece)].copy_(torch.frombuffer(piece, dtype=torch.uint8))
            start += len(piece)
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
        writer.try_device(config)

    def connected(self, connection: socket.socket) -> ReceiveLink:
        buffers = self.writer.ring(self._config)
        link = _Written(self.writer, buffers, connection)
        try:
            places = [self.writer.place(buffer) for buffer in buffers]
            frames = [part for place in places for part in (_LENGTH.pack(len(place)), place)]
            fixed = _PLACES.pack(MAGIC, VERSION, self._config.device is not None, len(places))
            connection.sendall(b"".join((fixed, *frames)))
        except BaseException:
            link.close()
            raise
        return link


class _Written(ReceiveLink):
    """One connection's places. What lies there is copied before it is checked: a late write may change it after."""

    def __init__(self, writer: Writer, buffers: Sequence[Tensor], connection: socket.socket) -> None:
        self._writer, self._buffers, self._connection = writer, buffers, connection
        self._next, self.held_bytes = itertools.cycle(buffers), sum(map(len, buffers))

    def read(self, payload: Tensor, aux: Tensor) -> None:
        place = next(self._next)
        if len(payload) > len(place):
            raise ProtocolError(f"chunk of {len(payload)} bytes is larger than a staging slot")
        if len(aux) and receive(self._connection, aux.numpy().data) is None:
            raise ConnectionError("closed inside a chunk")
        # torch's copy: other threads of the worker run on meanwhile; on a GPU the stream does it, and nothing waits
        payload.copy_(place[: len(payload)], non_blocking=True)

    def close(self) -> None:
        for buffer in self._buffers:
            self._writer.give(buffer)
