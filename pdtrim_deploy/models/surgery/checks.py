"""Which blocks and which tensors in their place are refused, in memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pdtrim_deploy.errors import UserError

LAYERS = "model.layers."
Replacements = Mapping[int, Mapping[str, torch.Tensor]]


def check_blocks(blocks: Sequence[int], total: int) -> None:
    """UserError: a model of `total` blocks lacks one of them, there is none, or one stands there twice."""
    wrong = [block for block in blocks if not 0 <= block < total]
    if wrong:
        raise UserError(f"block {wrong[0]} does not exist; the model has blocks 0 to {total - 1}")
    if not blocks or len(set(blocks)) != len(blocks):
        raise UserError(f"blocks {list(blocks)}: at least one, and none twice")


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...] | None) -> None:
    """UserError: a replacement's shape is not `expected`; None: the block has no tensor of that name."""
    if tuple(tensor.shape) != expected:
        has = "has no such tensor" if expected is None else f"has {expected}"
        raise UserError(f"replacement of {name}: shape {tuple(tensor.shape)}, the block {has}")
