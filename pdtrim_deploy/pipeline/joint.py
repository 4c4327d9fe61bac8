"""The step that chooses, for a recipe's target, the actions of both stages and how KV travels: all in one solve."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pdtrim_deploy.pipeline.chosen import PRUNING, TARGET
from pdtrim_deploy.pipeline.context import Context, write_json
from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.recipe import Recipe

if TYPE_CHECKING:
    from pdtrim_deploy.joint.choice import BlockChoice
    from pdtrim_deploy.joint.search import Outcome
    from pdtrim_deploy.kvchoice import Problem

CHOSEN = (PRUNING, TARGET)


def choose(context: Context) -> set[str]:
    """Answer the recipe's target -> reports/pruning.json, as a search leaves it, and reports/target.json."""
    from pdtrim_deploy.joint.choice import DECODE, PREFILL, block_choices
    from pdtrim_deploy.joint.costs import CostTable
    from pdtrim_deploy.joint.effects import JointMeasure
    from pdtrim_deploy.joint.search import JointSearch

    recipe, target = context.recipe, context.recipe.target
    assert target is not None
    problem = _problem(context)
    for_prefill, for_decode = target.stages
    options = block_choices(
        _sends(recipe, problem), PREFILL if for_prefill else ("keep",), DECODE if for_decode else ("keep",)
    )
    table = CostTable.of(context.shape, context.checkpoint.config, target, recipe.kv.prompt_tokens)
    measure = JointMeasure(problem, options, context.note)
    outcome = JointSearch(measure, table, context.note, rounds=target.rounds).answer(target)
    if outcome.sentence:
        context.note(f"target: {outcome.sentence}")
    write_json(context.out / PRUNING, _pruning(outcome.result.choices))
    write_json(context.out / TARGET, _report(recipe, table.tokens, outcome))
    return {PRUNING, TARGET}


def _problem(context: Context) -> Problem:
    """The unpruned model in both stages, with key offsets where the recipe has any, and the KV section's text."""
    from pdtrim_deploy.kvchoice.offsets import measure
    from pdtrim_deploy.models.oracle import PDOracle
    from pdtrim_deploy.pipeline.kv_problem import problem_of

    recipe, plan = context.recipe, PDPlan.dense(context.shape)
    model = context.streamed_model
    oracle = PDOracle(model, model, plan)
    if recipe.kv.measures_offsets and plan.model.offsets_keys:
        tokens = recipe.kv.prompt_tokens
        text = context.calibration(recipe.kv.sequences, tokens, tokens)
        oracle = oracle.with_offsets(measure(oracle, text, context.note).offsets)
    problem = problem_of(context, oracle, recipe.kv.prompt_tokens, plan, None)
    return replace(problem, seed=recipe.calibration.seed)


def _sends(recipe: Recipe, problem: Problem) -> tuple[KVSend, ...]:
    """Rules that a layer may have, whole KV first."""
    if recipe.kv.method == "none":
        return (KVSend(wire_dtype=recipe.kv.wire_dtype),)
    suited = [send for send in recipe.kv.options() if problem.oracle.plan.model.suits(send)]
    return tuple(sorted(suited, key=lambda send: send != KVSend()))


def _pruning(choices: tuple[BlockChoice, ...]) -> dict[str, Any]:
    """Of both stages, as `Solution.parse` reads it; blocks that prefill runs for their KV alone are no loss yet."""
    lost: dict[str, dict[str, Any]] = {
        stage: {"removed": [], "pairs": [], "loss": None, "trajectory": [], "attentions": [], "mlps": []}
        for stage in ("prefill", "decode")
    }
    names = {"drop": "removed", "without_attention": "attentions", "without_mlp": "mlps", "kv_only": "kv_only"}
    lost["prefill"]["kv_only"] = []
    for block, choice in enumerate(choices):
        for stage, action in zip(lost, choice.actions, strict=True):
            if action.kind != "keep":
                lost[stage][names[action.kind]].append(block)
    return lost


def _report(recipe: Recipe, tokens: int, outcome: Outcome) -> dict[str, Any]:
    result, target = outcome.result, recipe.target
    assert target is not None
    reached = dict(result.ratios)
    reached["kv"] = 1 / reached["kv"]
    kinds = Counter((choice.prefill, choice.decode) for choice in result.choices)
    return {
        "target": target.goals,
        "taken": dict(outcome.taken),
        "sentence": outcome.sentence,
        "reached": reached | {"loss": result.loss},
        "counted_at": {
            "isl": tokens,
            "batch": target.batch,
            "times": "computed" if target.times is None else "measured",
        },
        "kl": {"predicted": result.predicted, "measured": result.measured},
        "blocks": [{"prefill": p, "decode": d, "count": count} for (p, d), count in sorted(kinds.items())],
        "choices": [[choice.prefill, choice.decode] for choice in result.choices],
        "sends": {block: choice.send.model_dump() for block, choice in enumerate(result.choices) if choice.attends},
    }
