"""The next block of a streamed model: read by a thread, and copied to its GPU, while the one before it computes.

On GPUs alone: the host has little else to do there. On a CPU the cores that would read ahead are those that compute.
No GPU has run the copies beside what computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class Prefetch:
    """One block ahead at a time: at first the next in order, then whichever came next the last time.

    Args:
        read: a block's tensors on the host; called by a thread, one block after another.
        blocks: of the model.

    Attributes:
        unused: blocks read ahead that were not the next ones.

    """

    def __init__(self, read: Callable[[int], Tensors], blocks: int) -> None:
        self._read, self._next = read, {block: block + 1 for block in range(blocks - 1)}
        self._thread = ThreadPoolExecutor(1, "pdtrim-prefetch")
        self._ahead: tuple[int, Future[Tensors]] | None = None
        self._last: int | None = None
        self.unused = 0

    def take(self, block: int) -> Tensors:
        """The block's tensors on the host; raises what reading it raised."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == block:
            return ahead[1].result()
        if ahead is not None:
            ahead[1].exception()  # two blocks are never read at a time
            self.unused += 1
        del ahead
        return self._read(block)

    def begin(self, block: int, alive: Collection[int]) -> None:
        """`block` is about to compute, and `alive` are in memory: read what comes next, unless it is among them."""
        if block == self._last:
            return
        if self._last is not None:
            self._next[self._last] = block
        self._last, coming = block, self._next.get(block)
        if coming is not None and coming not in alive and self._ahead is None:
            self._ahead = coming, self._thread.submit(self._read, coming)


class Uploads:
    """Copies to GPUs on a stream of their own, beside what computes there; to other devices as usual."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def to(self, tensors: Mapping[str, Tensor], device: torch.device) -> Tensors:
        """`tensors` on `device`; what computes there next waits for them."""
        if device.type != "cuda" or not torch.cuda.is_available():
            return {name: tensor.to(device) for name, tensor in tensors.items()}
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream, computing = self._streams[device], torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            copies = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        computing.wait_event(stream.record_event())
        for copy in copies.values():
            copy.record_stream(computing)  # else its memory could be another's before the last product read it
        return copies
