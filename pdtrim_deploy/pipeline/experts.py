"""The step that chooses which experts each stage keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pdtrim_deploy.pipeline import texts
from pdtrim_deploy.pipeline.chosen import EXPERTS, chosen_blocks
from pdtrim_deploy.pipeline.context import Context, write_json
from pdtrim_deploy.pipeline.stand_in import fixed_rules
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.recipe.kv import FIXED_KV

_VERSION = 1  # of how experts are ranked


def depends_on(dump: Mapping[str, Any]) -> list[Any]:
    """What the step depends on besides the one before; `dump` is the recipe's."""
    kv, pool = dump["kv"], {key: value for key, value in dump["kv"].items() if key == "pool_dtype"}
    kv = kv if kv["method"] in FIXED_KV else pool or None
    return [_VERSION, dump["pruning"]["experts"], dump["calibration"], kv]


def keep_experts(context: Context) -> set[str]:
    """Rank experts on calibration text and choose -> reports/experts.json: what is kept, and each expert's score."""
    from pdtrim_deploy.pruning.experts import choose_experts

    section, checkpoint = context.recipe.pruning.experts, context.checkpoint
    shape = checkpoint.family.expert_shape(checkpoint.config)
    assert section is not None
    assert shape is not None
    ids, prompt = texts.searched(context), context.recipe.calibration.prompt
    together = len(ids) if context.bounded else 4  # so that a block that is read from disk comes once a stage
    plan = _with_known_rules(context)
    choice = choose_experts(context.streamed_model, plan, shape, section, ids, prompt, together, context.note)
    scores = {
        stage: {block: [round(float(score), 6) for score in values] for block, values in by_block.items()}
        for stage, by_block in choice.scores.items()
    }
    kept = None if choice.kept is None else choice.kept.model_dump(mode="json")
    write_json(context.out / EXPERTS, {"method": section.method, "shared": section.shared, "kept": kept} | scores)
    return {EXPERTS}


def _with_known_rules(context: Context) -> PDPlan:
    """The blocks' plan with the KV rules that the recipe itself gives; whole KV where rules are measured later.

    Where key offsets are measured later, rows travel unquantised here: quantised without offsets they would be others.
    """
    section, plan = context.recipe.kv, chosen_blocks(context)
    if section.method not in FIXED_KV:
        return plan
    rules = fixed_rules(section, len(plan.kv))
    if section.measures_offsets:
        rules = tuple(send.model_copy(update={"wire_dtype": "native"}) for send in rules)
    return plan.with_kv(rules)
