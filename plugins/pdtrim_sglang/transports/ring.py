"""The staging slots of one connection at decode: a chunk is read into one while another one's rows are scattered."""

from __future__ import annotations

import queue
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_sglang.protocol import ChunkHeader, body_matches
from pdtrim_sglang.transports.base import ReceiveLink, TransportConfig, staging_buffer
from pdtrim_sglang.transports.sums import sum_bytes


class Slot:
    """Host memory that grows with the chunks, by doubling up to `most_bytes`; where it is pinned, at once.

    Pinning takes milliseconds, in which the GPU waits. With a `device` payloads have `most_bytes` there from the first
    chunk on, and the host's memory is for aux rows.
    """

    def __init__(self, most_bytes: int, device: torch.device | None = None) -> None:
        self._most_bytes, self._device, self._host = most_bytes, device, torch.empty(0, dtype=torch.uint8)
        self._on_device: Tensor | None = None

    @property
    def held_bytes(self) -> int:
        """Of memory, on the host and on the GPU."""
        return len(self._host) + (0 if self._on_device is None else len(self._on_device))

    def take(self, payload_bytes: int, aux_bytes: int) -> tuple[Tensor, Tensor]:
        """Places for a payload and an aux row."""
        if self._device is None:
            body = self._take(payload_bytes + aux_bytes, self._most_bytes)
            return body[:payload_bytes], body[payload_bytes:]
        if self._on_device is None:
            self._on_device = staging_buffer(self._most_bytes, self._device)
        return self._on_device[:payload_bytes], self._take(aux_bytes, aux_bytes)

    def _take(self, length: int, most: int) -> Tensor:
        if length > len(self._host):
            grown = most if torch.cuda.is_available() else min(2 * len(self._host), most)
            self._host = staging_buffer(max(length, grown))
        return self._host[:length]


@dataclass(frozen=True)
class ReadChunk:
    """A chunk that lies in `slot`, its rows in `payload`, its aux row in `aux`; `intact` when its checksum says so."""

    header: ChunkHeader
    payload: Tensor
    aux: memoryview
    intact: bool
    slot: Slot


class Ring:
    """Slots of one connection. One thread reads chunks into free ones, another one frees them."""

    def __init__(self, config: TransportConfig) -> None:
        self._slots = [Slot(config.staging_bytes, config.device) for _ in range(config.staging_slots)]
        self._free = queue.SimpleQueue[Slot]()
        for slot in self._slots:
            self._free.put(slot)

    @property
    def held_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(slot.held_bytes for slot in self._slots)

    def read(self, link: ReceiveLink, data: bytes, header: ChunkHeader) -> ReadChunk:
        """The chunk whose header is `data`, once a slot is free for it. OSError as of the link.

        Its bytes are in the slot when this returns, on a GPU too: the checksum was computed behind them.
        """
        slot = self._free.get()
        payload, aux = slot.take(header.payload_bytes, header.aux_bytes)
        link.read(payload, aux)
        rows, rest = sum_bytes(payload), memoryview(aux.numpy().data)
        return ReadChunk(header, payload, rest, body_matches(data, (rows, rest)), slot)

    def free(self, chunk: ReadChunk) -> None:
        """Its rows are scattered."""
        self._free.put(chunk.slot)
