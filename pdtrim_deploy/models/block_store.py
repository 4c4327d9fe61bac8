"""A checkpoint's blocks as tensors, so many in memory at most; on GPUs the next is read while another computes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor

from pdtrim_deploy.local.compute import ON_CPU, Compute
from pdtrim_deploy.models.checkpoint import Checkpoint
from pdtrim_deploy.models.families.disk_names import DiskNames
from pdtrim_deploy.models.loading import TORCH_DTYPES
from pdtrim_deploy.models.prefetch import Prefetch, Uploads
from pdtrim_deploy.models.reading import read_weights

_HOST = torch.device("cpu")


class Blocks:
    """Tensors of a checkpoint's blocks by their name within the block, `most` blocks in memory at a time.

    Room is made by the block that is needed last, if blocks follow one another as they did the last time: of a model
    that runs from end to end again and again all but one of them stay. On GPUs one more is read while another computes
    (`prefetch`).

    Attributes:
        reads: blocks read so far, but for those read ahead in vain.

    """

    def __init__(
        self, checkpoint: Checkpoint, most: int, compute: Compute = ON_CPU, rounded: str | None = None
    ) -> None:
        self._most, self._compute, self._count = most, compute, checkpoint.facts.num_blocks
        self._reader = _Reader(checkpoint, TORCH_DTYPES[compute.dtype], rounded)
        self.alive, self.reads, self._uploads = OrderedDict[int, dict[str, Tensor]](), 0, Uploads()
        self._last, self._follower = -1, dict[int, int]()
        self.prefetch = Prefetch(self._reader.read, self._count)
        self.reads_ahead = compute.on_gpu

    def __getitem__(self, block: int) -> dict[str, Tensor]:
        if block != self._last:
            self._follower[self._last] = block
            self._last = block
        if block in self.alive:
            self.alive.move_to_end(block)
        else:
            while len(self.alive) >= self._most:
                del self.alive[self._needed_last(block)]
            self.alive[block] = self._fetch(block)
            self.reads += 1
        if self.reads_ahead:
            self.prefetch.begin(block, self.alive)
        return self.alive[block]

    def _needed_last(self, block: int) -> int:
        """Of those in memory, behind `block`; the least recently used of those that none is foreseen to need."""
        waits, coming = dict[int, int](), self._follower.get(block, block)
        while coming != block and coming not in waits:
            waits[coming] = len(waits)
            coming = self._follower.get(coming, block)
        return max(self.alive, key=lambda other: waits.get(other, self._count))

    def _fetch(self, block: int) -> dict[str, Tensor]:
        """On its device: there tensor by tensor, unless the whole block was read ahead."""
        if not self.reads_ahead:
            return self._reader.read(block, self.device(block))
        return self._uploads.to(self.prefetch.take(block), self.device(block))

    def device(self, block: int) -> torch.device:
        """Where that block runs."""
        return torch.device(self._compute.device_of(block, self._count))


class _Reader:
    """A block's tensors from their shards, cast; refers to nothing that holds weights, for a thread refers to it."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, rounded: str | None) -> None:
        self._checkpoint, self._dtype, self._rounded = checkpoint, dtype, rounded

    def read(self, block: int, device: torch.device = _HOST) -> dict[str, Tensor]:
        """By their name within the block, each on `device` as soon as it is read."""
        checkpoint, prefix = self._checkpoint, f"model.layers.{block}."
        inside = [name.removeprefix(prefix) for name in checkpoint.weights if name.startswith(prefix)]
        by_parameter = DiskNames(checkpoint.family, checkpoint.config, block)
        parts = {name: by_parameter.parameter(name) for name in inside}
        tensors: dict[str, Tensor] = {}
        for parameter in dict.fromkeys(parts.values()):  # of the stacked ones, one at a time is there twice
            names = [prefix + name for name in by_parameter.of(parameter)]
            read = read_tensors(checkpoint, names, self._dtype, self._rounded)
            tensors[parameter] = by_parameter.join(parameter, [read[name] for name in names]).to(device)
        return tensors


def read_tensors(
    checkpoint: Checkpoint, names: Iterable[str], dtype: torch.dtype, rounded: str | None = None
) -> dict[str, Tensor]:
    """Copies in memory of weights, `rounded` to that dtype and cast to `dtype`, but for those whose dtype is kept."""
    keeps_dtype, first = checkpoint.family.keeps_dtype, dtype if rounded is None else TORCH_DTYPES[rounded]
    read = read_weights(checkpoint.tensors, names, first, quantized=checkpoint.quantized, keeps_dtype=keeps_dtype)
    return {name: tensor if keeps_dtype(name) else tensor.to(dtype) for name, tensor in read.items()}
