"""Layers that a stage runs without their attention or their MLP: these are cut out of a model that SGLang has loaded.

In the checkpoint o_proj or down_proj of such a layer is zero, so this changes no result, only time and memory. It is
done before SGLang sizes its pool and captures CUDA graphs: attentions that are left are numbered anew, as KV layers,
and the pool has a layer for each of these alone. Written against the decoder layers of SGLang 0.5.23 (models/llama.py
and those like it): `self_attn.attn`, `mlp` or `block_sparse_moe`, `input_layernorm`, `post_attention_layernorm`.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from pdtrim_deploy.plan import PDPlan, Stage
from pdtrim_sglang.plan_source import read_plan

logger = logging.getLogger("sglang.srt.pdtrim.sublayers")


def stage_plan(runner: Any) -> tuple[PDPlan, Stage] | None:
    """The plan and the stage of a ModelRunner's model; None for a draft model, or one without a plan.

    A worker without disaggregation runs the one model of a unified plan, which is either stage.
    """
    mode = runner.server_args.disaggregation_mode
    if getattr(runner, "is_draft_worker", False):
        return None
    plan = read_plan(runner.model_config.model_path)
    if plan is None or (mode == "null" and not plan.unified):
        return None
    return plan, "decode" if mode == "decode" else "prefill"


def cut_sublayers(runner: Any, model: Any = None) -> None:
    """Cut the model that SGLang's ModelRunner has just loaded, where its plan leaves sublayers out.

    Args:
        model: another than the runner's own, of the same stage and plan.

    Raises:
        RuntimeError: the weights come later, and would find their places gone.

    """
    model = runner.model if model is None else model
    layers = getattr(getattr(model, "model", None), "layers", ())  # an engine has none
    if not layers or (known := stage_plan(runner)) is None:
        return
    plan, stage = known
    blocks, missing = plan.layers(stage), plan.missing(stage)
    if not missing or len(layers) != len(blocks) or runner.server_args.pp_size > 1:  # the latter are refused later
        return
    if runner.startup_weight_load is not None:
        raise RuntimeError(
            f"pdtrim: sublayers are cut out of a model whose weights are there: start {stage} without "
            "--startup-weight-load-mode overlap"
        )
    if not all(hasattr(getattr(layer, "self_attn", None), "attn") for layer in layers):
        raise RuntimeError(
            f"pdtrim: SGLang runs {type(model).__name__} by modules that the plugin does not cut: build the "
            "bundle without sublayers left out"
        )
    freed = sum(
        cut_attention(layers[at]) if missing[block] == "attention" else cut_mlp(layers[at])
        for at, block in enumerate(blocks)
        if block in missing
    )
    kept = [layer.self_attn.attn for layer in layers if not isinstance(layer.self_attn, ZeroAttention)]
    for number, attention in enumerate(kept):
        attention.layer_id = number
    logger.info(
        "pdtrim: layers of blocks %s without attention, of %s without MLP; %.1f MB of weights freed",
        *([block for block, lost in missing.items() if lost == sublayer] for sublayer in ("attention", "mlp")),
        freed / 1e6,
    )  # fmt: skip


def count_kv_layers(runner: Any) -> None:
    """Have SGLang make pools of as many layers as the plan gives the stage KV layers: of an engine's stage too.

    Beside layers with linear attention it counts KV layers itself, among all of the model's.
    """
    if (known := stage_plan(runner)) is None or runner.server_args.pp_size > 1:
        return
    plan, stage = known
    if plan.model.states is not None:
        return
    info, count = runner.layer_info, len(plan.kv_blocks(stage))
    if info.num_effective_layers == len(plan.layers(stage)) != count:
        runner.layer_info = msgspec.structs.replace(
            info, end_layer=info.start_layer + count, num_effective_layers=count
        )


def cut_attention(layer: Any) -> int:
    """Cut the attention of one of SGLang's decoder layers; returns the bytes of weights freed.

    Projections are its own, a table of rotations is all layers'.
    """
    freed = sum(free(getattr(layer.self_attn, name)) for name in ("qkv_proj", "o_proj"))
    layer.self_attn = ZeroAttention()
    _forget_projection(getattr(layer, "input_layernorm", None))
    return freed


def cut_mlp(layer: Any) -> int:
    """Cut the MLP, or the experts, of one of SGLang's decoder layers; returns the bytes of weights freed."""
    name = "mlp" if hasattr(layer, "mlp") else "block_sparse_moe"
    freed = free(getattr(layer, name))
    setattr(layer, name, ZeroMLP())
    _forget_projection(layer.post_attention_layernorm)
    return freed


def free(module: nn.Module) -> int:
    """Free a module's weights at once, and return their bytes.

    A parameter's `weight_loader` holds its module, so that they would wait for a cyclic collection.
    """
    freed = 0
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        freed += tensor.nbytes
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return freed


def _forget_projection(norm: Any) -> None:
    if norm is not None:
        vars(norm).pop("_quant_linear", None)  # it would quantise for the projection that was there


class ZeroAttention(nn.Module):
    """In the place of an attention; it has no `attn`, which is how SGLang looks for attentions."""

    def forward(self, positions: Tensor, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Zeros like the hidden states."""
        return hidden_states.new_zeros(hidden_states.shape)


class ZeroMLP(nn.Module):
    """In the place of an MLP."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Zeros like `x`."""
        return x.new_zeros(x.shape)
