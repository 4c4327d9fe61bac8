"""All that executor `tensorrt` asks of TensorRT, so that a stand-in can take its place where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

View = Callable[[int, tuple[int, ...], torch.dtype], Tensor]
"""(device address, shape, dtype) -> a tensor over that memory."""


class Session(Protocol):
    """One execution context, and what its engine says of its tensors.

    `inputs`: most elements by name, all int64 vectors. `outputs`: shape (-1: as an input's) and dtype by name.
    """

    inputs: Mapping[str, int]
    outputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Of an input, for the calls that follow."""

    def set_address(self, name: str, pointer: int) -> None:
        """Of an input or output, for the calls that follow."""

    def another(self) -> Session:
        """A context of the same engine. They share scratch memory, so their runs must follow each other on a stream."""

    def enqueue(self, stream: int) -> bool:
        """Run on a cudaStream_t; False when it could not be enqueued."""
