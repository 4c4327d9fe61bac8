"""Expert surgery: blocks with some of their experts, in memory and on disk. A stage numbers its experts from 0."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.checkpoint import Checkpoint
from pdtrim_deploy.models.families import Family, known_family
from pdtrim_deploy.models.families.blocks import EXPERT
from pdtrim_deploy.models.families.disk_names import DiskNames
from pdtrim_deploy.models.quantized.module_lists import tells_experts_apart
from pdtrim_deploy.models.streaming import keep_rows
from pdtrim_deploy.plan import BlockExperts

ExpertsByBlock = Mapping[int, Sequence[int]]
"""Kept experts of each block that has experts, by their number in the original block; nothing: all are kept."""


def check_experts(family: Family, config: Mapping[str, Any], blocks: Sequence[int], experts: ExpertsByBlock) -> None:
    """Raise UserError where a stage of `blocks` cannot have these experts."""
    if not experts:
        return
    if (shape := family.expert_shape(config)) is None:
        raise UserError(f"{family.architecture} has no experts to keep; name none")
    expected = {block for block in blocks if block >= shape.first_block}
    if odd := {*experts} ^ expected:
        raise UserError(f"experts of block {min(odd)}: name those of each block with experts that the stage runs")
    if len(counts := {len(kept) for kept in experts.values()}) > 1:
        raise UserError(f"blocks keep {min(counts)} to {max(counts)} experts; a stage has one number for all blocks")
    for block, kept in experts.items():
        try:
            shape.check(BlockExperts(block=block, kept=tuple(kept)))
        except ValueError as error:
            raise UserError(f"experts of a stage: {error}") from None


def check_formats(checkpoint: Checkpoint) -> None:
    """Raise UserError where quantised weights cannot be renumbered: experts named in settings, a quantised router."""
    if checkpoint.quantized is None:
        return
    if tells_experts_apart(checkpoint.quantized.section, checkpoint.tensors):
        raise UserError(f"{checkpoint.path}: its quantisation names single experts, which cannot be renumbered")
    routers = tuple(f".{name}_scale" for name in checkpoint.family.expert_rows)
    if scales := [name for name in checkpoint.tensors if name.removesuffix("_inv").endswith(routers)]:
        raise UserError(f"{checkpoint.path}: its router is quantised ({min(scales)}), so that its rows cannot be cut")


def kept_count(experts: ExpertsByBlock) -> int | None:
    """Experts in each block; None where all are kept."""
    return next((len(kept) for kept in experts.values()), None)


def parameters_by_expert(family: Family, config: Mapping[str, Any], block: int) -> Iterator[str]:
    """Names within the block of the parameters and buffers whose first axis is by expert, in transformers' module."""
    if family.blocks is None or family.blocks.experts is None or family.is_dense(config, block):
        return
    names = DiskNames(family, config, block)
    yield from dict.fromkeys((*family.blocks.experts.stacked, *map(names.parameter, family.expert_rows)))


def routers(model: Any, block: int) -> Iterator[tuple[str, Tensor]]:
    """Name within the block and value of each parameter that has a row for each expert and is none itself."""
    family, layer = known_family(type(model).__name__), model.model.layers[block]
    parameters = dict(layer.named_parameters())
    stacked = family.blocks.experts.stacked if family.blocks and family.blocks.experts else ()
    for name in parameters_by_expert(family, model.config.to_dict(), block):
        if name not in stacked and name in parameters:
            yield name, parameters[name].detach()


def keep_in_memory(layer: nn.Module, names: Iterator[str], kept: Sequence[int]) -> None:
    """Leave the experts `kept` in a layer whose modules are the stage's own; `names` as `parameters_by_expert` says.

    The kept rows are copies.
    """
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = layer.get_submodule(owner)
        keep_rows(module, leaf, kept)
        if hasattr(module, "num_experts"):
            module.num_experts = len(kept)  # type: ignore[assignment]


class ExpertNames:
    """Names of a block's tensors on disk, in the original and in a stage that keeps the experts `kept`."""

    def __init__(self, family: Family, kept: Sequence[int] | None) -> None:
        tensors = family.blocks.experts.tensors if family.blocks and family.blocks.experts else {}
        places = {re.escape(name.partition(EXPERT)[0]) for name in tensors if EXPERT in name}
        self._of_expert = re.compile(rf"({'|'.join(sorted(places))})(\d+)(\..*)") if places else None
        self._rows, self._kept = family.expert_rows, kept

    def in_stage(self, name: str) -> str | None:
        """The stage's name of a tensor; None where it is of an expert that the stage does not keep."""
        if self._kept is None or self._of_expert is None or (match := self._of_expert.fullmatch(name)) is None:
            return name
        place, number, rest = match.groups()
        return f"{place}{self._kept.index(int(number))}{rest}" if int(number) in self._kept else None

    def rows(self, name: str) -> Sequence[int] | None:
        """The rows of a tensor that the stage keeps; None: all."""
        return self._kept if name in self._rows else None


def stage_rows(tensor: Tensor, rows: Sequence[int] | None) -> Tensor:
    """Those rows, in a tensor of their own; the tensor itself where `rows` is None."""
    return tensor if rows is None else tensor[list(rows)]
