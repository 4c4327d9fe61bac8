"""Prefill layers that run for their K and V alone, but for a prompt's last tokens, which they run whole.

Of all other tokens such a layer makes K and V by second projections (and norms), and leaves the hidden state as it is.
The tail goes through the layer as the model has it, whose attention reads those K and V. So the tokens that say what
comes next, and the K and V that decode reads most, are near the dense model's. (POP, arXiv:2602.03295, runs the last
prompt token whole.) The checkpoint has the model's own layers; the second projections lie beside it in `KV_ONLY`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.block_tensors import BlockTensors, read_blocks
from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.models.outputs import OUTPUTS
from pdtrim_deploy.models.surgery import keep_blocks
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.blocks import KV_ONLY

_ALONE = "kv_only"  # attribute of a whole layer: the same with the second projections


def attach(model: CausalLM, plan: PDPlan, projections: BlockTensors) -> CausalLM:
    """Give the whole layers of a prefill model of `plan` their second projections; returns the model.

    They are no part of the model for transformers: what saves, moves or counts parameters does not see them.
    """
    places = {block: layer for layer, block in enumerate(plan.prefill_layers)}
    second = {places[block]: tensors for block, tensors in projections.items()}
    alone = keep_blocks(model, range(len(places)), second).model.layers
    for layer in plan.kv_only_layers:
        vars(model.model.layers[layer])[_ALONE] = alone[layer]
    return model


def divide(changed: BlockTensors, plan: PDPlan) -> tuple[BlockTensors, BlockTensors]:
    """Changed tensors of the prefill of a plan with a tail: those of its own layers, and what makes K and V alone."""
    alone = {plan.prefill_layers[layer] for layer in plan.kv_only_layers}
    own = {block: tensors for block, tensors in changed.items() if block not in alone}
    second = {
        block: {name: tensor for name, tensor in tensors.items() if name not in OUTPUTS}
        for block, tensors in changed.items()
        if block in alone
    }
    return own, second


def read(folder: Path, plan: PDPlan) -> BlockTensors:
    """Second projections of a prefill checkpoint, by block.

    Raises:
        UserError: the file is missing, or is not of the plan's blocks.

    """
    path, blocks = folder / KV_ONLY, {plan.prefill_layers[layer] for layer in plan.kv_only_layers}
    again = "copy it from the bundle that the plan is of, or build the bundle again"
    try:
        tensors = read_blocks(path)
    except Exception as error:  # safetensors raises its own
        raise UserError(f"{path}: the second K and V projections cannot be read ({error}); {again}") from None
    if set(tensors) != blocks:
        raise UserError(f"{path}: is of blocks {sorted(tensors)}, the plan's are {sorted(blocks)}; {again}")
    return tensors


def check_attached(model: CausalLM, plan: PDPlan) -> None:
    """Raise ValueError where the plan's prefill has a tail and the model no second projections."""
    if plan.kv_only_tail and any(_alone(model.model.layers[layer]) is None for layer in plan.kv_only_layers):
        raise ValueError("the prefill model has no second K and V projections, which the plan's tail asks for")


def advance(run: LayerRun, kvs: Sequence[LayerKV], tail: int) -> None:
    """Take whole prompts through the next layer: their last `tail` tokens run it whole, the others for K and V."""
    layer = run.layer
    alone = _alone(run.runner.layers[layer])
    for at, (hidden, kv) in enumerate(zip(run.states, kvs, strict=True)):
        before, last = hidden.split([max(0, hidden.shape[1] - tail), min(tail, hidden.shape[1])], 1)
        if before.shape[1]:
            run.runner.block(layer, before, run.runner.span(before), kv, alone)
        last = run.runner.block(layer, last, run.runner.span(last, before.shape[1]), kv)
        run.states[at] = torch.cat((before.to(last.device), last), 1)
    run.skip()


def _alone(layer: nn.Module) -> nn.Module | None:
    return vars(layer).get(_ALONE)
