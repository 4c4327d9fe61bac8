"""A model with some of its blocks that shares the weights of the whole one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.experts import (
    ExpertsByBlock,
    check_experts,
    keep_in_memory,
    kept_count,
    parameters_by_expert,
)
from pdtrim_deploy.models.families import known_family
from pdtrim_deploy.models.placement import device_of
from pdtrim_deploy.models.streaming import replace_streamed
from pdtrim_deploy.models.sublayers import check_missing, skip_sublayers
from pdtrim_deploy.models.surgery.checks import LAYERS, Replacements, check_blocks, check_shape
from pdtrim_deploy.plan import Sublayer


def keep_blocks(
    model: Any,
    blocks: Sequence[int],
    replacements: Replacements | None = None,
    experts: ExpertsByBlock | None = None,
    missing: Mapping[int, Sublayer] | None = None,
) -> Any:
    """A new model with those blocks, in that order; parameters are shared, everything else is its own.

    The given model is left as it was: `layer_idx`, config and hooks differ, the weights are the same tensors (so
    training one would train the other). Costs milliseconds. `replacements` and `experts` as in `write_stage`: those
    tensors are cast to the model's dtype, and its alone, on the device of their block; weights of kept experts are
    copies. `missing` gives the sublayer that a block runs without: it is not there, nor are tensors of it.
    """
    check_blocks(blocks, len(model.model.layers))
    check_missing(blocks, missing or {})
    family, experts, full = known_family(type(model).__name__), experts or {}, model.config.to_dict()
    check_experts(family, full, blocks, experts)
    cut = _twin(model)
    cut.model.layers = nn.ModuleList([cut.model.layers[block] for block in blocks])
    for index, (block, layer) in enumerate(zip(blocks, cut.model.layers, strict=True)):
        renumber(layer, index)
        if block in experts:
            keep_in_memory(layer, parameters_by_expert(family, full, block), experts[block])
    config = copy.deepcopy(model.config)
    for module in cut.modules():
        if getattr(module, "config", None) is model.config:
            module.config = config
    config.num_hidden_layers = len(blocks)
    for key, value in family.cut_config(model.config, blocks, kept_count(experts)).items():
        setattr(config, key, value)
    for block, parts in (replacements or {}).items():
        if block not in blocks:
            raise UserError(f"block {block} is replaced but the stage does not run it")
        layer = cut.model.layers[list(blocks).index(block)]
        for name, tensor in parts.items():
            _replace(layer, f"{LAYERS}{block}.", name, tensor)
    return skip_sublayers(cut, blocks, missing or {})


def _replace(layer: nn.Module, prefix: str, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    old = dict(layer.named_parameters()).get(name)
    check_shape(prefix + name, tensor, None if old is None else tuple(old.shape))
    assert old is not None
    if old.is_meta:
        replace_streamed(layer.get_submodule(owner), leaf, tensor.to(old.dtype))
        return
    layer.get_submodule(owner)._parameters[leaf] = nn.Parameter(
        tensor.to(device_of(layer), old.dtype), requires_grad=False
    )


def renumber(layer: nn.Module, index: int) -> None:
    """Tell a block's modules which layer of a model it is."""
    for module in layer.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = index  # type: ignore[assignment]


def _twin(module: nn.Module) -> Any:
    """A copy of the module tree over the very same parameters and buffers."""
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):  # _modules, _parameters, _buffers, hooks
            twin.__dict__[name] = copy.copy(value)
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _twin(child)
    return twin
