"""Blocks of a model in memory that run without their attention or their MLP; on disk the same blocks have zeros.

What a sublayer adds to the hidden state is linear in its last projection, whatever norm or factor stands between: those
have no constant part in the families whose blocks are known. So zeros there are the same function as no sublayer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.outputs import output_parameters
from pdtrim_deploy.plan import Sublayer

MODULES: dict[Sublayer, str] = {"attention": "self_attn", "mlp": "mlp"}


class NoAttention(nn.Module):
    """In the place of a block's attention: adds nothing to the hidden state, has no K and V."""

    sliding_window: int | None = None

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Zeros like the hidden states, and no attention weights."""
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """In the place of a block's MLP, or of its experts."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Zeros like the hidden states."""
        return torch.zeros_like(hidden_states)


def has_attention(layer: nn.Module) -> bool:
    """Whether a decoder layer holds K and V; one with linear attention has no `self_attn`."""
    return not isinstance(getattr(layer, "self_attn", None), NoAttention | None)


def has_mlp(layer: nn.Module) -> bool:
    """Whether a decoder layer runs its MLP, or its experts."""
    return not isinstance(layer.mlp, NoMLP)


def without_sublayer(layer: nn.Module, sublayer: Sublayer) -> nn.Module:
    """A copy of a decoder layer that lacks a sublayer; weights and hooks of the rest are shared."""
    twin = copy.copy(layer)
    twin.__dict__["_modules"] = dict(layer._modules)
    twin._modules[MODULES[sublayer]] = NoAttention() if sublayer == "attention" else NoMLP()
    return twin


def skip_sublayers(model: Any, blocks: Sequence[int], missing: Mapping[int, Sublayer]) -> Any:
    """`model`, whose layers are `blocks`, without what `missing` names by block: itself where it lacks that already.

    A copy shares weights. A model that comes from disk has zeros there; this one does not run them.
    """
    layers = list(model.model.layers)
    for at, block in enumerate(blocks):
        sublayer = missing.get(block)
        if sublayer is not None and (has_attention if sublayer == "attention" else has_mlp)(layers[at]):
            layers[at] = without_sublayer(layers[at], sublayer)
    if all(new is old for new, old in zip(layers, model.model.layers, strict=True)):
        return model
    twin, inner = copy.copy(model), copy.copy(model.model)
    inner.__dict__["_modules"] = {**model.model._modules, "layers": nn.ModuleList(layers)}
    twin.__dict__["_modules"] = {**model._modules, "model": inner}
    return twin


def zero_outputs(layer: nn.Module, sublayer: Sublayer) -> dict[str, Tensor]:
    """What a stage checkpoint has in the place of the sublayer's last projection, by name within the block; float32.

    Each tensor is one zero seen at every place. `layer` may be on the meta device.
    """
    names = [name for name in output_parameters(layer) if name.startswith(f"{MODULES[sublayer]}.")]
    return {name: torch.zeros(1).expand(layer.get_parameter(name).shape) for name in names}


def check_missing(blocks: Sequence[int], missing: Mapping[int, Sublayer]) -> None:
    """Raise UserError where a block lacks a sublayer that the stage does not run."""
    for block, sublayer in missing.items():
        if block not in blocks:
            raise UserError(f"block {block} is to run without its {sublayer} but the stage does not run it")
