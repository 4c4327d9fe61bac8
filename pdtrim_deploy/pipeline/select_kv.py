"""The step that chooses how each decode layer's prompt KV travels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pdtrim_deploy.bundle import PLAN, REPORTS, WORK
from pdtrim_deploy.pipeline import heal
from pdtrim_deploy.pipeline.context import Context, write_json
from pdtrim_deploy.pipeline.stand_in import stand_in_rules
from pdtrim_deploy.plan import STAGES, KVSend, PDPlan
from pdtrim_deploy.recipe_kv import FIXED_KV

if TYPE_CHECKING:
    from torch import Tensor

    from pdtrim_deploy.kvcache.selection import Problem
    from pdtrim_deploy.kvcache.selection.base import Kept

KV, ATTENTION = (f"{REPORTS}/{name}.json" for name in ("kv", "attention"))
SHOWN, SHOWN_SEQUENCES = (4, 64), 4  # first and last tokens whose attention is shown where the recipe names none


def select_kv(context: Context) -> None:
    """Choose how each decode layer's prompt KV travels -> plan.json, reports/kv.json.

    Where decode looks stands in reports/attention.json, if the choice looked at the model.
    """
    (context.out / ATTENTION).unlink(missing_ok=True)
    asked, plan = context.recipe.kv, heal.blocks_plan(context)
    plan = plan.with_kv(stand_in_rules(asked, plan.model, len(plan.decode_layers)))
    if asked.method not in FIXED_KV:
        plan = plan.with_kv(_chosen(context, plan))
    sends = {block: send.model_dump() for block, send in zip(plan.decode_layers, plan.kv, strict=True)}
    sparse = [block for block, send in zip(plan.decode_layers, plan.kv, strict=True) if send.mode == "sparse"]
    write_json(context.out / KV, {"method": asked.method, "sparse_blocks": sparse, "sends": sends})
    write_json(context.out / PLAN, plan.model_dump(mode="json"))


def _chosen(context: Context, plan: PDPlan) -> tuple[KVSend, ...]:
    from pdtrim_deploy.evaluation.oracle import PDOracle
    from pdtrim_deploy.kvcache.recall import with_recall
    from pdtrim_deploy.kvcache.selection import Problem, get_selection

    asked, pair = context.recipe.kv, heal.stage_pair(context)
    models = [pair.stage(stage) for stage in STAGES]
    text = context.calibration(asked.sequences, asked.prompt_tokens + asked.continuation_tokens)
    seed = context.recipe.calibration.seed
    if asked.recall:
        text = with_recall(text, asked.prompt_tokens, asked.recall, seed)
    oracle, work = PDOracle(models[0], models[1], plan), context.out / WORK
    problem = Problem(oracle, text, asked.prompt_tokens, seed, _kept(context, text), work)
    write_json(context.out / ATTENTION, _attention(context, problem))
    return get_selection(asked).choose(problem, context.note)


_EFFECTS = 1  # version of what is kept


def _kept(context: Context, text: Tensor) -> Kept:
    """Keeps measured effects in the cache: the same blocks and text with another budget need no measuring."""
    from safetensors.torch import load_file

    from pdtrim_deploy.checkpoints.writer import save

    asked, plan = context.recipe.kv, heal.blocks_plan(context)
    about = [_EFFECTS, context.checkpoint.fingerprint, plan.digest, heal.weights(context), asked.prompt_tokens]
    about += [context.recipe.calibration.seed, hashlib.sha256(text.numpy().tobytes()).hexdigest()]

    def kept(name: str, make: Callable[[], Tensor]) -> Tensor:
        key = hashlib.sha256(json.dumps([*about, name]).encode()).hexdigest()
        folder = context.cache.entry(
            "kv-effects", key, lambda place: save({"kept": make()}, place / "kept.safetensors")
        )
        return load_file(folder / "kept.safetensors")["kept"]

    return kept


def _attention(context: Context, problem: Problem) -> dict[str, Any]:
    """Of each decode layer, mean over KV heads: the share of attention on each part of the prompt."""
    from pdtrim_deploy.kvcache.attention_mass import attention_mass

    asked, n = context.recipe.kv, problem.prompt_tokens
    first, last = (asked.n_first, asked.n_last) if asked.n_first + asked.n_last else SHOWN
    text = problem.sequences[:SHOWN_SEQUENCES]
    mass = attention_mass(problem.oracle, text, n, first, last, progress=context.note)
    parts = ("first", "last", "middle", "generated")
    shares = {part: getattr(mass, part).mean(1).round(decimals=6).tolist() for part in parts}
    blocks = list(problem.oracle.plan.decode_layers)
    return {"n_first": first, "n_last": last, "prompt_tokens": n, "sequences": len(text), "blocks": blocks} | shares
