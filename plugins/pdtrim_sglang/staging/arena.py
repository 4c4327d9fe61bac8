"""One buffer of fixed size, cut into blocks; a block is free again when nobody holds it any more."""

from __future__ import annotations

import bisect
import threading
import weakref
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

HOST_ALIGNMENT = 64  # bytes: a cache line, and any vector load
DEVICE_ALIGNMENT = 256  # bytes: what TensorRT asks of an output's address (setTensorAddress, NvInferRuntime.h)


class Block:
    """`bytes` is uint8 `[size]`, a view of the arena. Whoever reads it holds the block, not only the view."""

    def __init__(self, data: Tensor) -> None:
        self.bytes = data


class Arena:
    """First fit over one buffer on the device where the engine runs. Thread-safe.

    A block ends with its last reference, wherever that is dropped: a request that fails half way frees what it held
    without anyone knowing of it, and no block is taken again while a sender still reads it.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)  # torch aligns it at least as much
        self._alignment = HOST_ALIGNMENT if self.buffer.is_cpu else DEVICE_ALIGNMENT
        self._taken: list[tuple[int, int]] = []  # half-open, ascending; changed in place, by single bytecodes:
        self._lock = threading.RLock()  # a collection may free a block anywhere inside `take`

    @property
    def used_bytes(self) -> int:
        """Bytes in blocks that somebody holds, alignment included."""
        with self._lock:
            return sum(stop - start for start, stop in [*self._taken])

    def starts(self, sizes: Sequence[int]) -> list[int]:
        """Where parts of these sizes begin in a block that holds them in order, and where the block ends.

        On a device each part is an engine's output and aligned as one. In host memory they touch, so that neighbours
        are sent as one piece.
        """
        step = 1 if self.buffer.is_cpu else DEVICE_ALIGNMENT
        return list(accumulate((-(-size // step) * step for size in sizes), initial=0))

    def take(self, size: int) -> Block | None:
        """A block of `size` bytes, None when no gap is large enough."""
        length = -(-max(size, 1) // self._alignment) * self._alignment  # an empty one, too, has a start of its own
        with self._lock:
            edges = [(0, 0), *self._taken, (len(self.buffer), len(self.buffer))]
            start = next((lo for (_, lo), (hi, _) in pairwise(edges) if hi - lo >= length), None)
            if start is None:
                return None
            taken = (start, start + length)
            bisect.insort(self._taken, taken)  # where it belongs now: what stood before it may be gone
            block = Block(self.buffer[start : start + size])
            weakref.finalize(block, self._free, taken)
            return block

    def _free(self, taken: tuple[int, int]) -> None:
        with self._lock:
            self._taken.remove(taken)
