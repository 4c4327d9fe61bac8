"""The plan as the steps that choose blocks and experts left it, read from their reports; all KV travels whole."""

from __future__ import annotations

import json

from pdtrim_deploy.bundle import REPORTS
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.plan import STAGES, KeptExperts, PDPlan
from pdtrim_deploy.pruning.solution import Solution

PRUNING, EXPERTS = f"{REPORTS}/pruning.json", f"{REPORTS}/experts.json"


def chosen_blocks(context: Context) -> PDPlan:
    """What each stage runs, with all experts."""
    report, shape = json.loads((context.out / PRUNING).read_text()), context.shape
    prefill, decode = (Solution.parse(report[stage]) for stage in STAGES)
    return PDPlan.uncut(shape, prefill.actions(shape.num_blocks), decode.actions(shape.num_blocks))


def chosen(context: Context) -> PDPlan:
    """What each stage runs, with the experts that it keeps."""
    plan = chosen_blocks(context)
    if context.recipe.pruning.experts is None:
        return plan
    kept = json.loads((context.out / EXPERTS).read_text())["kept"]
    return plan if kept is None else plan.with_parts(experts=KeptExperts.model_validate(kept))
