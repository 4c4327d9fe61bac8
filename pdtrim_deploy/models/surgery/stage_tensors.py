"""The tensors of a stage: what each is called there, what it comes from, and what stands in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.checkpoint import Checkpoint
from pdtrim_deploy.models.experts import ExpertNames, ExpertsByBlock, parameters_by_expert
from pdtrim_deploy.models.families.disk_names import DiskNames
from pdtrim_deploy.models.sublayers import check_missing, zero_outputs
from pdtrim_deploy.models.surgery.checks import LAYERS, Replacements, check_shape
from pdtrim_deploy.plan import Sublayer


@dataclass(frozen=True)
class Source:
    """A tensor of the original checkpoint, and the rows of it that the stage has; None: all."""

    name: str
    rows: Sequence[int] | None = None

    def elements(self, checkpoint: Checkpoint) -> int:
        """Elements that the stage has of it."""
        info = checkpoint.tensors[self.name]
        return info.elements if self.rows is None else info.elements // info.shape[0] * len(self.rows)


def stage_names(checkpoint: Checkpoint, blocks: Sequence[int], experts: ExpertsByBlock) -> dict[str, Source]:
    """Names in the stage and what they come from, in the order they are stored: embeddings, blocks, the rest."""
    place = {block: index for index, block in enumerate(blocks)}
    by_block = {block: ExpertNames(checkpoint.family, experts.get(block)) for block in blocks}
    names: dict[tuple[int, str], Source] = {}
    for source in sorted(checkpoint.tensors):
        if not source.startswith(LAYERS):
            names[(-1, source)] = Source(source)
            continue
        number, _, inner = source.removeprefix(LAYERS).partition(".")
        if (index := place.get(int(number))) is None:
            continue
        expert_names = by_block[int(number)]
        if (name := expert_names.in_stage(inner)) is not None:
            names[(index, f"{LAYERS}{index}.{name}")] = Source(source, expert_names.rows(inner))
    return {name: names[(index, name)] for index, name in sorted(names)}


def replaced_tensors(
    checkpoint: Checkpoint, blocks: Sequence[int], replacements: Replacements, experts: ExpertsByBlock
) -> dict[str, torch.Tensor]:
    """By the original's names; of a tensor with a row for each expert, the rows that the stage has."""
    tensors: dict[str, torch.Tensor] = {}
    for block, parts in replacements.items():
        if block not in blocks:
            raise UserError(f"block {block} is replaced but the stage does not run it")
        prefix = f"{LAYERS}{block}."
        names = DiskNames(checkpoint.family, checkpoint.config, block, experts.get(block))
        rows = ExpertNames(checkpoint.family, experts.get(block)).rows
        for name, tensor in parts.items():
            sources = names.of(name)
            infos = {source: info for source in sources if (info := checkpoint.tensors.get(prefix + source))}
            shapes = [
                info.shape if (kept := rows(source)) is None else (len(kept), *info.shape[1:])
                for source, info in infos.items()
            ]
            check_shape(prefix + name, tensor, names.shape(name, shapes) if len(shapes) == len(sources) else None)
            tensors |= {prefix + source: part for source, part in names.split(name, tensor)}
    return tensors


def with_zeros(
    checkpoint: Checkpoint,
    blocks: Sequence[int],
    replacements: Replacements,
    experts: ExpertsByBlock,
    missing: Mapping[int, Sublayer],
) -> Replacements:
    """`replacements`, and zeros where a sublayer is missing."""
    if not missing:
        return replacements
    check_missing(blocks, missing)
    model_class = checkpoint.family.model_class
    with torch.device("meta"):
        model = model_class._from_config(model_class.config_class.from_dict(checkpoint.config))
    joined = {block: dict(parts) for block, parts in replacements.items()}
    for block, sublayer in missing.items():
        zeros = zero_outputs(model.model.layers[block], sublayer)
        if block in experts:  # what stacks experts along its first axis has the kept ones alone
            stacked = parameters_by_expert(checkpoint.family, checkpoint.config, block)
            zeros = {n: z[: len(experts[block])] if n in stacked else z for n, z in zeros.items()}
        joined[block] = joined.get(block, {}) | zeros
    return joined
