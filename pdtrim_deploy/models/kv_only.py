"""Prefill layers that run for their K and V alone, but for a prompt's last tokens, which they run whole.

Of all other tokens such a layer makes K and V by second projections (and norms), and leaves the hidden state as it is.
The tail goes through the layer as the model has it, whose attention reads those K and V: what the pair says next is
then nearer to the dense model's. The checkpoint has the model's own layers; the second projections lie beside it
(`second_tensors.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pdtrim_deploy.models.block_tensors import BlockTensors
from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.models.quantized.inputs import keep_inputs
from pdtrim_deploy.models.surgery import keep_blocks
from pdtrim_deploy.plan import PDPlan

_ALONE = "kv_only"  # attribute of a whole layer: the same with the second projections


def attach(model: CausalLM, plan: PDPlan, projections: BlockTensors) -> CausalLM:
    """Give the whole layers of a prefill model of `plan` their second projections; returns the model.

    They are no part of the model for transformers: what saves, moves or counts parameters does not see them. Of a
    model with FP8 weights they are not FP8, and neither is what they are multiplied with.
    """
    places = {block: layer for layer, block in enumerate(plan.prefill_layers)}
    second = {places[block]: tensors for block, tensors in projections.items()}
    alone = keep_blocks(model, range(len(places)), second).model.layers
    for layer in plan.kv_only_layers:
        for name in second[layer]:
            keep_inputs(alone[layer].get_submodule(name.rpartition(".")[0]))
        vars(model.model.layers[layer])[_ALONE] = alone[layer]
    return model


def check_attached(model: CausalLM, plan: PDPlan) -> None:
    """Raise ValueError where the plan's prefill has a tail and the model no second projections."""
    if plan.kv_only_tail and not all(attached(model.model.layers[layer]) for layer in plan.kv_only_layers):
        raise ValueError("the prefill model has no second K and V projections, which the plan's tail asks for")


def attached(layer: nn.Module) -> bool:
    """Whether the layer has second projections: it runs whole for a tail alone."""
    return _ALONE in vars(layer)


def advance(run: LayerRun, kvs: Sequence[LayerKV], tail: int) -> None:
    """Take whole prompts through the next layer: their last `tail` tokens run it whole, the others for K and V."""
    layer = run.layer
    alone = vars(run.runner.layers[layer])[_ALONE]
    for at, (hidden, kv) in enumerate(zip(run.states, kvs, strict=True)):
        before, last = hidden.split([max(0, hidden.shape[1] - tail), min(tail, hidden.shape[1])], 1)
        if before.shape[1]:
            run.runner.block(layer, before, run.runner.span(before), kv, alone)
        if last.shape[1]:
            last = run.runner.block(layer, last, run.runner.span(last, before.shape[1]), kv)
        run.states[at] = torch.cat((before.to(last.device), last), 1)
    run.skip()
