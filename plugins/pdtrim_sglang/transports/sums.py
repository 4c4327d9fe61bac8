"""What of a payload goes into its chunk's checksum: the bytes themselves, or the checksum that its GPU computed."""

from __future__ import annotations

from torch import Tensor

from pdtrim_deploy.kvcache.checksum import checksum


def sum_bytes(payload: Tensor) -> memoryview | bytes:
    """The bytes of a payload on the host; else 8 bytes, for which this waits until the current stream is there."""
    return memoryview(payload.numpy().data) if payload.is_cpu else as_bytes(checksum(payload))


def as_bytes(total: Tensor) -> bytes:
    """A checksum, int64 `[1]`, little-endian. Waits for the GPU if it is there."""
    return int(total.item()).to_bytes(8, "little", signed=True)
