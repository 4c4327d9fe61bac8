"""Tensors of single blocks, as healing changes them, in one safetensors file: `{block}.{name}`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pdtrim_deploy.models.writer import save

BlockTensors = Mapping[int, Mapping[str, Tensor]]
"""By block, then by the tensor's name within the block: `{4: {"mlp.down_proj.weight": ...}}`."""


def cast(blocks: BlockTensors, dtype: str) -> BlockTensors:
    """The same in another dtype, by its name."""
    to: torch.dtype = getattr(torch, dtype)
    return {block: {name: tensor.to(to) for name, tensor in named.items()} for block, named in blocks.items()}


def save_blocks(blocks: BlockTensors, file: Path) -> None:
    """Store them; UserError where `writer.save` has one."""
    save({f"{block}.{name}": tensor for block, named in blocks.items() for name, tensor in named.items()}, file)


def read_blocks(file: Path) -> dict[int, dict[str, Tensor]]:
    """What `save_blocks` stored."""
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(file).items():
        block, _, inner = name.partition(".")
        blocks.setdefault(int(block), {})[inner] = tensor
    return blocks
