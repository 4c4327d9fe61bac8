"""The steps, each a function of the context that leaves its files in the bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdtrim_deploy.bundle import PLAN, REPORTS, WORK, write_atomic
from pdtrim_deploy.pipeline import heal, heal_kv
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.pipeline.heal import PRUNING
from pdtrim_deploy.pipeline.stand_in import stand_in_rules
from pdtrim_deploy.plan import STAGES, KVSend, PDPlan, Stage
from pdtrim_deploy.recipe_kv import FIXED_KV

if TYPE_CHECKING:
    from pdtrim_deploy.kvcache.selection import Problem
    from pdtrim_deploy.pruning.candidates import Candidates
    from pdtrim_deploy.pruning.finalists import Finalist, Judge
    from pdtrim_deploy.pruning.search import SearchResult
    from pdtrim_deploy.pruning.stages import Elsewhere

KV, CANDIDATES, ATTENTION = (f"{REPORTS}/{name}.json" for name in ("kv", "candidates", "attention"))
SHOWN, SHOWN_SEQUENCES = (4, 64), 4  # first and last tokens whose attention is shown where the recipe names none
SEARCHES = tuple(f"{REPORTS}/search-{stage}.jsonl" for stage in STAGES)


def prune(context: Context) -> None:
    """Choose what each stage loses -> reports/pruning.json, and what the searches did -> reports/search-STAGE.jsonl.

    What every block could lose, by redundancy, stands in reports/candidates.json.
    """
    asked, text = context.recipe.pruning, context.recipe.calibration
    (context.out / CANDIDATES).unlink(missing_ok=True)
    going = (asked.prefill_blocks, asked.decode_blocks - asked.prefill_blocks)
    for search, blocks in zip(SEARCHES, going, strict=True):
        if not blocks:  # what an earlier recipe's search left is none of this bundle's
            (context.out / search).unlink(missing_ok=True)
    report: dict[Stage, Any] = {stage: {"removed": [], "pairs": [], "loss": None, "trajectory": []} for stage in STAGES}
    if asked.decode_blocks:
        from pdtrim_deploy.pruning.candidates import find
        from pdtrim_deploy.pruning.search import Settings
        from pdtrim_deploy.pruning.stages import choose_stages

        ids = context.calibration(text.sequences, text.length)
        model = context.searched_model
        candidates = find(model, ids, asked.threshold, context.note)
        _write_json(context.out / CANDIDATES, asdict(candidates))
        pairs, students, about = _pairs(context, ids, candidates) if asked.distil else ((), None, None)
        with _elsewhere(context) as elsewhere:
            found = choose_stages(
                model,
                ids,
                asked.prefill_blocks,
                asked.decode_blocks,
                method=asked.method,
                settings=Settings(asked.seed, asked.steps, asked.minutes),
                pairs=pairs,
                students=students,
                memory=asked.memory_mb << 20,
                disk=asked.disk_mb << 20,
                folder=context.out / REPORTS,
                about=[context.checkpoint.fingerprint, about],
                elsewhere=elsewhere,
                judge=_judge(context, students) if asked.finalists else None,
                finalists=asked.finalists,
                progress=context.note,
            )
        report = {stage: _stage_report(getattr(found, stage), found.finalists.get(stage)) for stage in STAGES}
    _write_json(context.out / PRUNING, report)


@contextmanager
def _elsewhere(context: Context) -> Iterator[Elsewhere | None]:
    """Ray's workers for the time of the step, if any were asked for."""
    if context.workers is None:
        yield None
        return
    from pdtrim_deploy.pruning import ray_evaluator

    context.note(f"starting {context.workers.count} Ray workers")
    with ray_evaluator.cluster(context.workers):
        yield ray_evaluator.Elsewhere(context.workers, context.checkpoint.path.resolve())


def _stage_report(found: SearchResult, finalists: Sequence[Finalist] | None) -> dict[str, Any]:
    steps = [asdict(step) for step in found.trajectory]
    report = {"removed": found.removed, "pairs": found.solution.pairs, "loss": found.loss, "trajectory": steps}
    if finalists:
        report["finalists"] = [
            {"removed": one.solution.removed, "pairs": one.solution.pairs, "loss": one.loss, "compensated": one.judged}
            for one in finalists
        ]
    return report


def _judge(context: Context, students: Any) -> Judge:
    """Has the last word on a search's finalists: on the text that weights are fitted to, as they will be."""
    from pdtrim_deploy.pruning.refitted import Refitted

    asked = context.recipe.healing
    ids = context.calibration(asked.sequences, asked.length)
    return Refitted(context.model, context.shape, ids, asked.compensation, students, context.note)


def _pairs(context: Context, ids: Any, found: Candidates) -> tuple[tuple[int, ...], Any, Any]:
    """The distillation set, its training-free students (those chosen are trained later), and what they depend on."""
    from pdtrim_deploy.pruning.students import Students

    asked = context.recipe.students.model_copy(update={"steps": 0, "minutes": None})
    students = Students(
        context.model,
        ids,
        asked,
        cache=context.cache,
        fingerprint=context.checkpoint.fingerprint,
        work=context.out / WORK,
        note=context.note,
    )
    return found.distillation, students, asked.model_dump(mode="json")


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
    _write_json(context.out / KV, {"method": asked.method, "sparse_blocks": sparse, "sends": sends})
    _write_json(context.out / PLAN, plan.model_dump(mode="json"))


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
    problem = Problem(PDOracle(models[0], models[1], plan), text, asked.prompt_tokens, seed)
    _write_json(context.out / ATTENTION, _attention(context, problem))
    return get_selection(asked).choose(problem, context.note)


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


def write_stage(context: Context, stage: Stage) -> None:
    """Write the stage's checkpoint with the plan in its config.json, and the weights that were healed."""
    from pdtrim_deploy.checkpoints.surgery import write_stage as write

    plan = context.plan
    blocks = plan.layers(stage)
    context.note(f"writing {len(blocks)} blocks")
    write(
        context.checkpoint,
        context.out / stage,
        blocks,
        context.recipe.model.dtype,
        plan.model_dump(mode="json"),
        replacements=heal_kv.changed(context).get(stage),
    )


def _write_json(path: Path, data: Any) -> None:
    write_atomic(path, json.dumps(data, indent=2) + "\n")
