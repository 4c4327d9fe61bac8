"""The plan as the steps that choose blocks and experts left it, read from their reports; all KV travels whole."""

from __future__ import annotations

import json

from pdtrim_deploy.bundle import REPORTS
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.plan import STAGES, KeptExperts, KVSend, PDPlan
from pdtrim_deploy.pruning.solution import Solution

PRUNING, EXPERTS, TARGET = (f"{REPORTS}/{name}.json" for name in ("pruning", "experts", "target"))


def chosen_blocks(context: Context) -> PDPlan:
    """What each stage runs, with all experts."""
    report, shape = json.loads((context.out / PRUNING).read_text()), context.shape
    prefill, decode = (Solution.parse(report[stage]) for stage in STAGES)
    plan = PDPlan.uncut(shape, prefill.actions(shape.num_blocks), decode.actions(shape.num_blocks))
    return plan.with_parts(unified=context.recipe.stages == "unified")


def chosen(context: Context) -> PDPlan:
    """What each stage runs, with the experts that it keeps."""
    plan = chosen_blocks(context)
    if context.recipe.pruning.experts is None:
        return plan
    kept = json.loads((context.out / EXPERTS).read_text())["kept"]
    return plan if kept is None else plan.with_parts(experts=KeptExperts.model_validate(kept))


def kv_only_blocks(context: Context) -> tuple[int, ...]:
    """Blocks that prefill runs for their K and V alone, as a target's answer has it."""
    return tuple(json.loads((context.out / PRUNING).read_text())["prefill"].get("kv_only", ()))


def joint_rules(context: Context, plan: PDPlan) -> tuple[KVSend, ...]:
    """How the prompt KV of each of decode's KV layers travels, as a target's answer has it."""
    sends = json.loads((context.out / TARGET).read_text())["sends"]
    return tuple(KVSend.model_validate(sends[str(block)]) for block in plan.decode_kv_blocks)
