"""The steps, each a function of the context that leaves its files in the bundle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pdtrim_deploy.bundle import REPORTS, WORK
from pdtrim_deploy.pipeline import heal_kv, texts
from pdtrim_deploy.pipeline.context import Context, write_json
from pdtrim_deploy.pipeline.heal import PRUNING
from pdtrim_deploy.plan import STAGES, Stage
from pdtrim_deploy.plan.kv import KEY_OFFSETS

if TYPE_CHECKING:
    from pdtrim_deploy.pruning.candidates import Candidates
    from pdtrim_deploy.pruning.finalists import Finalist, Judge
    from pdtrim_deploy.pruning.search import SearchResult
    from pdtrim_deploy.pruning.stage_search import EvaluatorFactory

CANDIDATES = f"{REPORTS}/candidates.json"
SEARCHES = tuple(f"{REPORTS}/search-{stage}.jsonl" for stage in STAGES)
SEARCHED_AGAIN, JUDGED = f"{REPORTS}/search-decode-again.jsonl", f"{REPORTS}/judged.jsonl"
FINALISTS = tuple(name.replace(".jsonl", "-finalists.jsonl") for name in (*SEARCHES, SEARCHED_AGAIN))
_JUDGE = 2  # version of how finalists are judged
PRUNED = (PRUNING, CANDIDATES, *SEARCHES, SEARCHED_AGAIN, *FINALISTS, JUDGED)


def prune(context: Context) -> None:
    """Choose what each stage loses -> reports/pruning.json, and what the searches did -> reports/search-STAGE.jsonl.

    What every block could lose, by redundancy, stands in reports/candidates.json.
    """
    asked = context.recipe.pruning
    (context.out / CANDIDATES).unlink(missing_ok=True)
    going = (asked.prefill_blocks, asked.decode_blocks - asked.prefill_blocks)
    for blocks, *left in zip(going, SEARCHES, FINALISTS[:2], strict=True):
        _unlink(context, bool(blocks), left)  # what an earlier recipe's search left is none of this bundle's
    report: dict[Stage, Any] = {stage: {"removed": [], "pairs": [], "loss": None, "trajectory": []} for stage in STAGES}
    again = False
    if asked.decode_blocks:
        from pdtrim_deploy.pruning.candidates import find
        from pdtrim_deploy.pruning.search import Settings
        from pdtrim_deploy.pruning.stages import choose_stages

        ids = texts.searched(context)
        model = context.searched_model
        candidates = find(model, ids, asked.threshold, context.note)
        write_json(context.out / CANDIDATES, asdict(candidates))
        pairs, students, about = _pairs(context, model, candidates) if asked.distil else ((), None, None)
        with _evaluator_factory(context) as evaluator_factory:
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
                evaluator_factory=evaluator_factory,
                judge=_judge(context, model, students, about) if asked.finalists else None,
                finalists=asked.finalists,
                progress=context.note,
            )
        report = {stage: _stage_report(getattr(found, stage), found.finalists.get(stage)) for stage in STAGES}
        again = any(one.behind is not None for one in found.finalists.get("prefill", ()))
    _unlink(context, again, (SEARCHED_AGAIN, FINALISTS[2]))
    _unlink(context, bool(asked.finalists), (*FINALISTS, JUDGED))
    write_json(context.out / PRUNING, report)


def _unlink(context: Context, kept: bool, files: Sequence[str]) -> None:
    """Those that are not kept."""
    for file in files if not kept else ():
        (context.out / file).unlink(missing_ok=True)


@contextmanager
def _evaluator_factory(context: Context) -> Iterator[EvaluatorFactory | None]:
    """Ray's workers for the time of the step, if any were asked for."""
    if context.workers is None:
        yield None
        return
    from pdtrim_deploy.pruning import ray_evaluator

    context.note(f"starting {context.workers.count} Ray workers")
    with ray_evaluator.cluster(context.workers):
        yield ray_evaluator.EvaluatorFactory(context.workers, context.checkpoint.path.resolve())


def _stage_report(found: SearchResult, finalists: Sequence[Finalist] | None) -> dict[str, Any]:
    steps = [asdict(step) for step in found.trajectory]
    report = {"removed": found.removed, "pairs": found.solution.pairs, "loss": found.loss, "trajectory": steps}
    if finalists:
        report["finalists"] = [_finalist_report(one) for one in finalists]
    return report


def _finalist_report(one: Finalist) -> dict[str, Any]:
    said = {"removed": one.solution.removed, "pairs": one.solution.pairs, "loss": one.loss, "compensated": one.judged}
    return said if one.behind is None else said | {"decode_behind": one.behind}


def _judge(context: Context, model: Any, students: Any, about: Any) -> Judge:
    """Has the last word on a search's finalists, compensated as they will be.

    What it says stands in reports/judged.jsonl.
    """
    from pdtrim_deploy.pruning.cached_judge import CachedJudge
    from pdtrim_deploy.pruning.refit_judge import RefitJudge

    asked, ids = context.recipe.healing, texts.judged(context)
    together = 1 if context.bounded else None
    judge = RefitJudge(model, context.shape, ids, asked.compensation, students, context.note, together)
    said = [_JUDGE, context.checkpoint.fingerprint, asked.compensation, texts.digest(ids), about]
    return CachedJudge(judge, context.out / JUDGED, said)


def _pairs(context: Context, model: Any, found: Candidates) -> tuple[tuple[int, ...], Any, Any]:
    """The distillation set, its training-free students (those chosen are trained later), and what they depend on."""
    from pdtrim_deploy.pruning.students import Students

    asked = context.recipe.students.model_copy(update={"steps": 0, "minutes": None})
    ids = texts.taught(context)
    students = Students(
        model,
        ids,
        asked,
        cache=context.cache,
        fingerprint=context.checkpoint.fingerprint,
        work=context.out / WORK,
        note=context.note,
    )
    return found.distillation, students, [asked.model_dump(mode="json"), texts.digest(ids)]


def write_stage(context: Context, stage: Stage) -> None:
    """Write the stage's checkpoint with the plan in its config.json, and the weights that were healed."""
    from pdtrim_deploy.models.surgery import write_stage as write

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
        files=[context.out / KEY_OFFSETS] if plan.key_offsets else [],
    )
