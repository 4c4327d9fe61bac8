"""Prefill layers of a loaded model that are there for their K and V alone are cut; with a tail, others beside them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pdtrim_deploy.models.body import check_body
from pdtrim_deploy.plan import PDPlan
from pdtrim_sglang.kv_only import keep_only_kv
from pdtrim_sglang.plan_source import read_plan
from pdtrim_sglang.prompt_tail.body import load_bodies
from pdtrim_sglang.prompt_tail.tails import PromptTails
from pdtrim_sglang.requirements.prompt_tail import check_two_models

UPDATES = (
    "pdtrim: new weights would not reach the layers that make K and V of most prompt tokens: build a bundle of them, "
    "and start prefill with it"
)
logger = logging.getLogger("sglang.srt.pdtrim.kv_only")


def cut_kv_only_layers(runner: Any) -> None:
    """Cut the model that SGLang's ModelRunner has just loaded, when it is a prefill stage with KV-only layers.

    Where the plan has a tail that model stays whole, and layers for other tokens are loaded and cut;
    `runner.pdtrim_tails` are then to be told of prompts.

    Raises:
        UserError: the body's checkpoint is not there.
        RuntimeError: the weights come later, and would find their places gone; or an option of SGLang's moves or loads
            one model's weights alone.

    """
    args = runner.server_args
    plan = read_plan(runner.model_config.model_path) if args.disaggregation_mode == "prefill" else None
    layers = getattr(getattr(runner.model, "model", None), "layers", ())  # an engine has none
    if plan is None or not plan.kv_only_layers or getattr(runner, "is_draft_worker", False):
        return
    if len(layers) != len(plan.prefill_layers) or args.pp_size > 1:  # refused later, by name
        return
    if runner.startup_weight_load is not None:
        raise RuntimeError(
            "pdtrim: KV-only layers are cut out of a model whose weights are there: start prefill without "
            "--startup-weight-load-mode overlap"
        )
    if not plan.kv_only_tail:
        _cut(layers, plan, runner)
        return
    check_two_models(args, plan)
    check_body(Path(runner.model_config.model_path), plan)
    first = plan.kv_only_layers[0]
    runner.pdtrim_tails = PromptTails(plan.kv_only_tail, first, load_bodies(runner, first))
    runner.model._derived_weight_cache_error = UPDATES  # which SGLang answers to whoever sends new weights
    logger.info(
        "pdtrim: layers from %d on run the last %d tokens of a prompt whole, and others for K and V alone",
        first, plan.kv_only_tail,
    )  # fmt: skip


def _cut(layers: Any, plan: PDPlan, runner: Any) -> None:
    freed = sum(keep_only_kv(layers[index], runner.model.config.hidden_size) for index in plan.kv_only_layers)
    logger.info("pdtrim: layers %s make K and V alone; %.1f MB of weights freed", plan.kv_only_layers, freed / 1e6)
