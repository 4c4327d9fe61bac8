"""The step that chooses how each decode layer's prompt KV travels, and what its keys travel less."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pdtrim_deploy.bundle import PLAN, REPORTS
from pdtrim_deploy.local.atomic import write_atomic
from pdtrim_deploy.pipeline import heal
from pdtrim_deploy.pipeline.chosen import joint_rules
from pdtrim_deploy.pipeline.context import Context, write_json
from pdtrim_deploy.pipeline.kv_problem import problem_of
from pdtrim_deploy.pipeline.stand_in import fixed_rules
from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.plan.kv import KEY_OFFSETS
from pdtrim_deploy.recipe.kv import FIXED_KV, cut_to

if TYPE_CHECKING:
    from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
    from pdtrim_deploy.kvchoice import Problem
    from pdtrim_deploy.models.oracle import PDOracle

KV, ATTENTION, OFFSETS = (f"{REPORTS}/{name}.json" for name in ("kv", "attention", "key-offsets"))
SELECTED = (PLAN, KV, ATTENTION, OFFSETS, KEY_OFFSETS)
SHOWN, SHOWN_SEQUENCES = (4, 64), 4  # first and last tokens whose attention is shown where the recipe names none


def select_kv(context: Context) -> set[str]:
    """Choose how each decode layer's prompt KV travels -> plan.json, reports/kv.json.

    Where decode looks stands in reports/attention.json, if the choice looked at the model; what quantised keys travel
    less in the file of key offsets, and what that does to them in reports/key-offsets.json, if any can be quantised.
    """
    section, plan = context.recipe.kv, heal.blocks_plan(context)
    measures_offsets = section.measures_offsets and plan.model.offsets_keys
    if section.method in FIXED_KV:
        plan = plan.with_kv(fixed_rules(section, len(plan.kv)))
    if section.method not in FIXED_KV or measures_offsets:
        plan = _looked_at(context, plan)
    sends = {block: send.model_dump() for block, send in zip(plan.decode_kv_blocks, plan.kv, strict=True)}
    sparse = [block for block, send in zip(plan.decode_kv_blocks, plan.kv, strict=True) if send.mode == "sparse"]
    write_json(context.out / KV, {"method": section.method, "sparse_blocks": sparse, "sends": sends})
    write_json(context.out / PLAN, plan.model_dump(mode="json"))
    measured = {OFFSETS} if measures_offsets else set()
    measured |= {ATTENTION} if section.method not in FIXED_KV else set()
    return {KV, PLAN, *measured, *([KEY_OFFSETS] if plan.key_offsets else [])}


def _looked_at(context: Context, plan: PDPlan) -> PDPlan:
    """The plan with what is measured on the stages as they are now: key offsets, and rules chosen with those."""
    from pdtrim_deploy.models.oracle import PDOracle

    pair = heal.stage_pair(context, bounded=True)
    oracle = PDOracle(pair.stage("prefill"), pair.stage("decode"), plan)
    if context.recipe.kv.measures_offsets and plan.model.offsets_keys:
        oracle = oracle.with_offsets(_offsets(context, oracle))
    if context.recipe.kv.method not in FIXED_KV:
        oracle = oracle.with_kv(_chosen(context, oracle))
    if oracle.offsets is None or not any(map(oracle.plan.has_key_offset, range(len(plan.kv)))):
        return oracle.plan.with_key_offsets(None)
    write_atomic(context.out / KEY_OFFSETS, oracle.offsets.data)
    return oracle.plan


def _offsets(context: Context, oracle: PDOracle) -> KeyOffsets | None:
    from pdtrim_deploy.kvchoice.offsets import measure

    section = context.recipe.kv
    length = min(section.prompt_tokens, context.checkpoint.facts.max_positions)
    measured = measure(oracle, context.calibration(section.sequences, length, length), context.note)
    sides = (measured.errors, measured.product_errors)
    keys, products = (dict(zip(oracle.plan.decode_kv_blocks, side, strict=False)) for side in sides)
    write_json(
        context.out / OFFSETS,
        {
            "rms_error_of_int4_keys": keys,
            "of_each_kv_head": ["whole", "less the mean"],
            "rms_error_of_query_times_key": products,
            "products_of_each_kv_head": ["without key scales", "with key scales"],
        },
    )
    return measured.offsets


def _chosen(context: Context, oracle: PDOracle) -> tuple[KVSend, ...]:
    from pdtrim_deploy.kvchoice import get_selection

    section = context.recipe.kv
    plan, weights = heal.blocks_plan(context), heal.weights(context)
    problem, *longer = (problem_of(context, oracle, tokens, plan, weights) for tokens in section.prompts)
    write_json(context.out / ATTENTION, _attention(context, problem))
    if context.recipe.target is not None:
        return joint_rules(context, oracle.plan)
    return get_selection(section).choose(replace(problem, longer=tuple(longer)), context.note)


def _attention(context: Context, problem: Problem) -> dict[str, Any]:
    """Of each decode layer, mean over KV heads: the share of attention on each part of the prompt."""
    from pdtrim_deploy.kvchoice.attention_mass import attention_mass

    section, n = context.recipe.kv, problem.prompt_tokens
    cut = section.n_first + section.n_last
    first, last = cut_to(section.n_first, section.n_last, section.share).edges(n) if cut else SHOWN
    text = problem.sequences[:SHOWN_SEQUENCES]
    mass = attention_mass(problem.oracle, text, n, first, last, progress=context.note)
    parts = ("first", "last", "middle", "generated")
    shares = {part: getattr(mass, part).mean(1).round(decimals=6).tolist() for part in parts}
    blocks = list(problem.oracle.plan.decode_kv_blocks)
    return {"n_first": first, "n_last": last, "prompt_tokens": n, "sequences": len(text), "blocks": blocks} | shares
