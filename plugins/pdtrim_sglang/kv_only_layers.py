"""Prefill layers of a loaded model that are there for their K and V alone: cut, or running tails of prompts whole."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pdtrim_deploy.models.second_tensors import read_second
from pdtrim_deploy.plan import PDPlan
from pdtrim_sglang.kv_only import keep_only_kv
from pdtrim_sglang.plan_source import read_plan
from pdtrim_sglang.prompt_tail.layer import TailedLayer
from pdtrim_sglang.prompt_tail.tails import PromptTails

logger = logging.getLogger("sglang.srt.pdtrim.kv_only")


def cut_kv_only_layers(runner: Any) -> None:
    """Cut the model that SGLang's ModelRunner has just loaded, when it is a prefill stage with KV-only layers.

    Raises:
        RuntimeError: the weights come later, and would find their places gone.

    """
    args = runner.server_args
    plan = read_plan(runner.model_config.model_path) if args.disaggregation_mode == "prefill" else None
    layers = getattr(getattr(runner.model, "model", None), "layers", ())  # an engine has none
    if plan is None or not plan.kv_only_layers:
        return
    if len(layers) != len(plan.prefill_layers) or args.pp_size > 1:  # refused later, by name
        return
    if runner.startup_weight_load is not None:
        raise RuntimeError(
            "pdtrim: KV-only layers are cut out of a model whose weights are there: start prefill without "
            "--startup-weight-load-mode overlap"
        )
    if plan.kv_only_tail:
        run_tails_whole(runner, plan)
        return
    freed = sum(keep_only_kv(layers[index], runner.model.config.hidden_size) for index in plan.kv_only_layers)
    logger.info("pdtrim: layers %s make K and V alone; %.1f MB of zeros freed", plan.kv_only_layers, freed / 1e6)


def run_tails_whole(runner: Any, plan: PDPlan) -> None:
    """Have KV-only layers run the tails of prompts whole; `runner.pdtrim_tails` are then to be told of prompts."""
    second = read_second(Path(runner.model_config.model_path), plan)
    runner.pdtrim_tails = tails = PromptTails(plan.kv_only_tail)
    for index in plan.kv_only_layers:
        layer = runner.model.model.layers[index]
        layer.forward = TailedLayer(layer, second[plan.prefill_layers[index]], tails)
    logger.info(
        "pdtrim: layers %s make K and V alone, but for the last %d tokens of a prompt",
        plan.kv_only_layers, plan.kv_only_tail,
    )  # fmt: skip
