"""A block's tensors by two names: as they lie on disk, and as transformers' modules hold them.

Both are the same but for families that rename (`block_sparse_moe.` is `mlp.`), and for experts, which modules stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pdtrim_deploy.models.families.base import Family
from pdtrim_deploy.models.families.blocks import EXPERT
from pdtrim_deploy.models.families.sizes import count_of


class DiskNames:
    """Of one block of a model. A parameter is transformers', within the block; a name is on disk, within the block.

    Args:
        kept: the experts that parameters hold, by their number on disk; all when left out.

    """

    def __init__(
        self, family: Family, config: Mapping[str, Any], block: int, kept: Sequence[int] | None = None
    ) -> None:
        experts = family.blocks.experts if family.blocks and not family.is_dense(config, block) else None
        self._numbers = (range(count_of(config, experts.count)) if kept is None else kept) if experts else ()
        parts = experts.stacked if experts else {}
        self._stacked = {parameter: names for parameter, names in parts.items() if EXPERT in names[0]}
        self._renamed = family.blocks.renamed if family.blocks else {}
        self._parameter = {name: parameter for parameter in self._stacked for name in self.of(parameter)}

    def parameter(self, name: str) -> str:
        """The parameter that holds the tensor `name`."""
        if name in self._parameter:
            return self._parameter[name]
        for part, other in self._renamed.items():
            name = name.replace(part, other)
        return name

    def of(self, parameter: str) -> list[str]:
        """Names of the tensors that make `parameter`, in the order of `join`."""
        if parameter in self._stacked:
            return [name for number in self._numbers for name in self._part(parameter, number)]
        for part, other in self._renamed.items():
            parameter = parameter.replace(other, part)
        return [parameter]

    def join(self, parameter: str, tensors: Sequence[Tensor]) -> Tensor:
        """The parameter, of the tensors `of` names."""
        if parameter not in self._stacked:
            return tensors[0]
        each = len(self._stacked[parameter])
        experts = (tensors[start : start + each] for start in range(0, len(tensors), each))
        return torch.stack([torch.cat(list(parts)) for parts in experts])

    def split(self, parameter: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `of`, by name: views of the parameter."""
        names = self.of(parameter)
        if parameter not in self._stacked:
            yield names[0], tensor
            return
        parts = [part for expert in tensor for part in expert.chunk(len(self._stacked[parameter]))]
        yield from zip(names, parts, strict=True)

    def shape(self, parameter: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The parameter's shape, of those of the tensors that `of` names."""
        if parameter not in self._stacked:
            return shapes[0]
        each = len(self._stacked[parameter])
        return (len(self._numbers), sum(shape[0] for shape in shapes[:each]), *shapes[0][1:])

    def _part(self, parameter: str, expert: int) -> list[str]:
        return [name.replace(EXPERT, str(expert)) for name in self._stacked[parameter]]
