"""The steps, each a function of the context that leaves its files in the bundle."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pdtrim_deploy.bundle import PLAN, REPORTS, write_atomic
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.pipeline.stand_in import actions, stand_in_rules
from pdtrim_deploy.plan import STAGES, KVSend, PDPlan, Stage
from pdtrim_deploy.recipe_kv import FIXED_KV

PRUNING, KV = f"{REPORTS}/pruning.json", f"{REPORTS}/kv.json"


def prune(context: Context) -> None:
    """Choose what each stage loses -> reports/pruning.json."""
    asked, text = context.recipe.pruning, context.recipe.calibration
    report: dict[str, Any] = {"prefill": {"removed": [], "trajectory": []}, "decode": {"removed": [], "trajectory": []}}
    if asked.decode_blocks:
        from pdtrim_deploy.pruning.stages import choose_stages

        found = choose_stages(
            context.model,
            context.calibration(text.sequences, text.length),
            asked.prefill_blocks,
            asked.decode_blocks,
            method=asked.method,
            progress=context.note,
        )
        report = {stage: asdict(getattr(found, stage)) for stage in report}
    _write_json(context.out / PRUNING, report)


def select_kv(context: Context) -> None:
    """Choose how each decode layer's prompt KV travels -> plan.json, reports/kv.json."""
    removed, asked, shape = json.loads((context.out / PRUNING).read_text()), context.recipe.kv, context.shape
    prefill, decode = (actions(shape.num_blocks, removed[stage]["removed"]) for stage in STAGES)
    layers = sum(action.kind == "keep" for action in decode)
    plan = PDPlan(model=shape, prefill=prefill, decode=decode, kv=stand_in_rules(asked, shape, layers))
    if asked.method not in FIXED_KV:
        plan = plan.with_kv(_chosen(context, plan))
    sends = {block: send.model_dump() for block, send in zip(plan.decode_layers, plan.kv, strict=True)}
    sparse = [block for block, send in zip(plan.decode_layers, plan.kv, strict=True) if send.mode == "sparse"]
    _write_json(context.out / KV, {"method": asked.method, "sparse_blocks": sparse, "sends": sends})
    _write_json(context.out / PLAN, plan.model_dump(mode="json"))


def _chosen(context: Context, plan: PDPlan) -> tuple[KVSend, ...]:
    from pdtrim_deploy.checkpoints.surgery import keep_blocks
    from pdtrim_deploy.evaluation.oracle import PDOracle
    from pdtrim_deploy.kvcache.selection import Problem, get_selection

    asked = context.recipe.kv
    models = [keep_blocks(context.model, plan.layers(stage)) for stage in STAGES]
    text = context.calibration(asked.sequences, asked.prompt_tokens + asked.continuation_tokens)
    problem = Problem(PDOracle(models[0], models[1], plan), text, asked.prompt_tokens, context.recipe.calibration.seed)
    return get_selection(asked).choose(problem, context.note)


def write_stage(context: Context, stage: Stage) -> None:
    """Write the stage's checkpoint with the plan in its config.json."""
    from pdtrim_deploy.checkpoints.surgery import write_stage as write

    plan = context.plan
    blocks = plan.layers(stage)
    context.note(f"writing {len(blocks)} blocks")
    write(context.checkpoint, context.out / stage, blocks, context.recipe.model.dtype, plan.model_dump(mode="json"))


def _write_json(path: Path, data: Any) -> None:
    write_atomic(path, json.dumps(data, indent=2) + "\n")
