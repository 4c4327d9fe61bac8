"""The last linear maps of a block's sublayers: what the block adds to its hidden state is linear in them."""

from __future__ import annotations

from torch import nn

OUTPUTS = (
    "self_attn.o_proj.weight",
    "self_attn.o_proj.bias",
    "mlp.down_proj.weight",
    "mlp.down_proj.bias",
    "mlp.experts.down_proj",
    "mlp.experts.down_proj_bias",
    "mlp.shared_experts.down_proj.weight",
)


def output_parameters(layer: nn.Module) -> list[str]:
    """Names of those that `layer` has: divided by a number, they divide what its attention and its MLP give."""
    names = {name for name, _ in layer.named_parameters()}
    return [name for name in OUTPUTS if name in names]
