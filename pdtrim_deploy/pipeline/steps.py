"""The steps, each a function of the context that leaves its files in the bundle."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pdtrim_deploy.bundle import PLAN, REPORTS, write_atomic
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.plan import STAGES, Action, Drop, Keep, KVSend, PDPlan, Stage
from pdtrim_deploy.recipe import FIXED_KV, KVSection

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
    """Choose the layers whose prompt KV is cut -> plan.json, reports/kv.json."""
    removed, asked, shape = json.loads((context.out / PRUNING).read_text()), context.recipe.kv, context.shape
    prefill, decode = (actions(shape.num_blocks, removed[stage]["removed"]) for stage in STAGES)
    layers = sum(action.kind == "keep" for action in decode)
    plan = PDPlan(model=shape, prefill=prefill, decode=decode, kv=kv_rules(asked, layers))
    if asked.method not in FIXED_KV:
        plan = plan.with_kv(_chosen(context, plan))
    sparse = [block for block, send in zip(plan.decode_layers, plan.kv, strict=True) if send.mode == "sparse"]
    _write_json(context.out / KV, {"method": asked.method, "sparse_blocks": sparse})
    _write_json(context.out / PLAN, plan.model_dump(mode="json"))


def _chosen(context: Context, plan: PDPlan) -> tuple[KVSend, ...]:
    from pdtrim_deploy.checkpoints.surgery import keep_blocks
    from pdtrim_deploy.evaluation.oracle import PDOracle
    from pdtrim_deploy.kvcache.selection import Request, get_selection

    asked = context.recipe.kv
    models = [keep_blocks(context.model, plan.layers(stage)) for stage in STAGES]
    request = Request(
        PDOracle(models[0], models[1], plan),
        context.calibration(asked.sequences, asked.prompt_tokens + asked.continuation_tokens),
        asked.prompt_tokens,
        asked.sparse_layers,
        asked.n_first,
        asked.n_last,
        asked.wire_dtype,
    )
    return get_selection(asked.method).choose(request, context.note)


def kv_rules(asked: KVSection, layers: int) -> tuple[KVSend, ...]:
    """The rules of a fixed method; for one that chooses, as many of each kind as it will give, in any order."""
    cut = {"none": 0, "all": layers}.get(asked.method, asked.sparse_layers)
    full = KVSend(wire_dtype=asked.wire_dtype)
    if not cut:
        return (full,) * layers
    sparse = KVSend(mode="sparse", n_first=asked.n_first, n_last=asked.n_last, wire_dtype=asked.wire_dtype)
    return (sparse,) * cut + (full,) * (layers - cut)


def write_stage(context: Context, stage: Stage) -> None:
    """Write the stage's checkpoint with the plan in its config.json."""
    from pdtrim_deploy.checkpoints.surgery import write_stage as write

    plan = context.plan
    blocks = plan.layers(stage)
    context.note(f"writing {len(blocks)} blocks")
    write(context.checkpoint, context.out / stage, blocks, context.recipe.model.dtype, plan.model_dump(mode="json"))


def actions(blocks: int, removed: Collection[int]) -> tuple[Action, ...]:
    """Keep all but `removed`."""
    return tuple(Drop() if block in removed else Keep() for block in range(blocks))


def _write_json(path: Path, data: Any) -> None:
    write_atomic(path, json.dumps(data, indent=2) + "\n")
