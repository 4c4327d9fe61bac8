"""The staging slots of one connection at decode: a chunk is read into one while another one's rows are scattered."""

from __future__ import annotations

import queue
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_sglang.protocol import ChunkHeader, body_matches
from pdtrim_sglang.transports.base import ReceiveLink, TransportConfig, staging_buffer


class Slot:
    """Host memory that grows with the chunks, by doubling up to `most_bytes`; where it is pinned, at once.

    Pinning takes milliseconds, in which the GPU waits.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self.memory = most_bytes, torch.empty(0, dtype=torch.uint8)

    def take(self, length: int) -> Tensor:
        """The first `length` bytes."""
        if length > len(self.memory):
            grown = self._most_bytes if torch.cuda.is_available() else min(2 * len(self.memory), self._most_bytes)
            self.memory = staging_buffer(max(length, grown))
        return self.memory[:length]


@dataclass(frozen=True)
class ReadChunk:
    """A chunk that lies in `slot`; `intact` when its checksum says so."""

    header: ChunkHeader
    body: Tensor
    intact: bool
    slot: Slot

    @property
    def payload(self) -> Tensor:
        """The packed rows."""
        return self.body[: self.header.payload_bytes]

    @property
    def aux(self) -> memoryview:
        """The aux row."""
        return memoryview(self.body[self.header.payload_bytes :].numpy().data)


class Ring:
    """Slots of one connection. One thread reads chunks into free ones, another one frees them."""

    def __init__(self, config: TransportConfig) -> None:
        self._slots = [Slot(config.staging_bytes) for _ in range(config.staging_slots)]
        self._free = queue.SimpleQueue[Slot]()
        for slot in self._slots:
            self._free.put(slot)

    @property
    def held_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(len(slot.memory) for slot in self._slots)

    def read(self, link: ReceiveLink, data: bytes, header: ChunkHeader) -> ReadChunk:
        """The chunk whose header is `data`, once a slot is free for it. OSError as of the link."""
        slot = self._free.get()
        body = slot.take(header.payload_bytes + header.aux_bytes)
        link.read(header, body)
        return ReadChunk(header, body, body_matches(data, (body.numpy().data,)), slot)

    def free(self, chunk: ReadChunk) -> None:
        """Its rows are scattered."""
        self._free.put(chunk.slot)
