"""The steps that choose and write blocks, each a function of the context that returns the files or folders it left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pdtrim_deploy.bundle import REPORTS, WORK
from pdtrim_deploy.pipeline import heal_kv, texts
from pdtrim_deploy.pipeline.chosen import PRUNING
from pdtrim_deploy.pipeline.context import Context, write_json
from pdtrim_deploy.plan import STAGES, Stage
from pdtrim_deploy.plan.blocks import BODY
from pdtrim_deploy.plan.kv import KEY_OFFSETS
from pdtrim_deploy.pruning.search_logs import DECODE_AGAIN, LOGS, finalists_log, search_log

if TYPE_CHECKING:
    from pdtrim_deploy.models.surgery import Replacements
    from pdtrim_deploy.pruning.finalists import Finalist, Judge
    from pdtrim_deploy.pruning.solution import Solution
    from pdtrim_deploy.pruning.stage_search import EvaluatorFactory, StageChoice
    from pdtrim_deploy.pruning.stages import StageRemovals
    from pdtrim_deploy.pruning.students import Students
    from pdtrim_deploy.pruning.teacher import Teacher

CANDIDATES, JUDGED = f"{REPORTS}/candidates.json", f"{REPORTS}/judged.jsonl"
PRUNED = (PRUNING, CANDIDATES, *(f"{REPORTS}/{name}" for name in LOGS), JUDGED)


def prune(context: Context) -> set[str]:
    """Choose what each stage loses -> reports/pruning.json, and what the searches did -> reports/search-STAGE.jsonl.

    What every block could lose, by redundancy, stands in reports/candidates.json.
    """
    if not context.recipe.pruning.decode_loses:
        nothing: dict[str, Any] = {"removed": [], "pairs": [], "loss": None, "trajectory": []}
        write_json(context.out / PRUNING, dict.fromkeys(STAGES, nothing))
        return {PRUNING}
    removals, judged = _search(context)
    report = {stage: _stage_report(getattr(removals, stage), removals.decode_losses) for stage in STAGES}
    write_json(context.out / PRUNING, report)
    section = context.recipe.pruning
    going = {"prefill": section.prefill_loses, "decode": section.decode_loses - section.prefill_loses}
    searches = [*(stage for stage, units in going.items() if units), *[DECODE_AGAIN] * bool(removals.decode_losses)]
    logs = [log(name) for name in searches for log in (search_log, *([finalists_log] if judged else []))]
    return {PRUNING, CANDIDATES, *(f"{REPORTS}/{name}" for name in logs), *([JUDGED] if judged else [])}


def _search(context: Context) -> tuple[StageRemovals, bool]:
    """What each stage loses, and whether finalists were judged."""
    from pdtrim_deploy.pruning.candidates import find
    from pdtrim_deploy.pruning.finalists import FinalRound
    from pdtrim_deploy.pruning.search import Settings, get_search
    from pdtrim_deploy.pruning.stage_search import SearchInputs
    from pdtrim_deploy.pruning.stages import choose_stages
    from pdtrim_deploy.pruning.units import Counts

    section, ids, model = context.recipe.pruning, texts.searched(context), context.streamed_model
    candidates = find(model, ids, section.threshold, context.note)
    write_json(context.out / CANDIDATES, asdict(candidates))
    students, about = _students(context, model) if section.distil else (None, None)
    final_round = None
    if section.finalists:
        baselines = {name: get_search(name) for name in section.baselines}
        final_round = FinalRound(_judge(context, model, students, about), section.finalists, baselines)
    with _evaluator_factory(context) as evaluator_factory:
        inputs = SearchInputs(
            model,
            ids,
            get_search(section.method, Settings(section.seed, section.steps, section.minutes, section.racing)),
            pairs=candidates.distillation if section.distil else (),
            students=students,
            memory=context.compute.states(section.memory_mb << 20),
            disk=section.disk_mb << 20,
            folder=context.out / REPORTS,
            about=[context.measured_model, about],
            evaluator_factory=evaluator_factory,
            final_round=final_round,
            teacher=_teacher(context, model, ids),
        )
        prompt_tokens = context.recipe.calibration.prompt
        prefill = Counts(section.prefill_blocks, section.prefill_mlps, section.prefill_attentions)
        decode = Counts(section.decode_blocks, section.decode_mlps, section.decode_attentions)
        removals = choose_stages(inputs, prefill, decode, prompt_tokens, progress=context.note)
    return removals, final_round is not None


@contextmanager
def _evaluator_factory(context: Context) -> Iterator[EvaluatorFactory | None]:
    """Ray's workers for the time of the step, if any were asked for."""
    if context.workers is None:
        yield None
        return
    from pdtrim_deploy.pruning import ray_evaluator

    context.note(f"starting {context.workers.count} Ray workers")
    with ray_evaluator.cluster(context.workers):
        yield ray_evaluator.EvaluatorFactory(context.workers, context.checkpoint.path.resolve(), context.compute.dtype)


def _stage_report(choice: StageChoice, decode_losses: Mapping[Solution, float]) -> dict[str, Any]:
    """`decode_losses` are the judge's of decode behind each of prefill's finalists that has one."""
    from pdtrim_deploy.pruning.units import block_of, kind_of

    lost, steps = choice.solution, list[dict[str, Any]]()
    for step in choice.steps:
        kind = kind_of(step.block)
        sublayer = {} if kind == "block" else {"sublayer": kind}
        steps.append(asdict(step) | {"block": block_of(step.block)} | sublayer)
    removed = [unit for unit in choice.removed if kind_of(unit) == "block"]
    report: dict[str, Any] = {"removed": removed, "pairs": lost.pairs, "loss": choice.loss, **lost.report}
    report |= {"trajectory": steps, "cost": asdict(choice.cost)}
    if choice.finalists:
        report["finalists"] = [_finalist_report(finalist, decode_losses) for finalist in choice.finalists]
    return report


def _finalist_report(finalist: Finalist, decode_losses: Mapping[Solution, float]) -> dict[str, Any]:
    lost = finalist.solution
    report = {"removed": lost.blocks, "pairs": lost.pairs, "loss": finalist.loss, "compensated": finalist.judged}
    report |= lost.report
    return report | ({"decode_behind": decode_losses[lost]} if lost in decode_losses else {})


def _judge(context: Context, model: Any, students: Any, about: Any) -> Judge:
    """Judges a search's finalists, compensated as they will be; its losses stand in reports/judged.jsonl."""
    from pdtrim_deploy.pruning.cached_judge import CachedJudge
    from pdtrim_deploy.pruning.compensation import FitRules
    from pdtrim_deploy.pruning.refit_judge import VERSION, RefitJudge

    section, ids = context.recipe.healing, texts.judged(context)
    rules = FitRules.of(section)
    together = 1 if context.bounded else None
    teacher = _teacher(context, model, ids)
    judge = RefitJudge(
        model, context.shape, ids, section.compensation, students, context.note, together, teacher, rules
    )
    key = [VERSION, context.measured_model, section.compensation, texts.digest(ids), about]
    key += [] if teacher is None else ["kl"]
    key += [] if rules == FitRules() else [asdict(rules)]
    return CachedJudge(judge, context.out / JUDGED, key)


def _teacher(context: Context, model: Any, ids: Any) -> Teacher | None:
    """The dense model's predictions on text, where the recipe's objective is to keep them."""
    from pdtrim_deploy.pruning.teacher import Teacher

    if context.recipe.pruning.objective == "loss":
        return None
    context.note(f"predictions of the dense model on {len(ids)} sequences of {ids.shape[1]} tokens")
    return Teacher.of(model, ids, note=context.note)


def _students(context: Context, model: Any) -> tuple[Students, list[object]]:
    """Training-free students of pairs (those chosen are trained later), and what they depend on."""
    from pdtrim_deploy.pruning.students import Students

    section = context.recipe.students.model_copy(update={"steps": 0, "minutes": None})
    ids = texts.taught(context)
    students = Students(
        model,
        ids,
        section,
        cache=context.cache,
        fingerprint=context.measured_model,
        work=context.out / WORK,
        note=context.note,
    )
    return students, [section.model_dump(mode="json"), texts.digest(ids)]


def write_stage(context: Context, stage: Stage) -> set[str]:
    """Write the stage's checkpoint with the plan in its config.json, and the weights that were healed."""
    from pdtrim_deploy.models.body import body_width
    from pdtrim_deploy.models.surgery import write_stage as write

    plan, changed = context.plan, heal_kv.changed(context).get(stage, {})
    files = [context.out / KEY_OFFSETS] if plan.key_offsets else []
    context.forget_model()
    quantized, folder = context.checkpoint.quantized, plan.folder(stage)
    parts: list[tuple[str, Sequence[int], Replacements, int | None]] = [(folder, plan.layers(stage), changed, None)]
    if stage == "prefill" and plan.kv_only_tail:
        width = body_width(context.checkpoint.config, quantized=quantized is not None)
        parts = [(folder, plan.layers(stage), {}, None), (f"{folder}/{BODY}", plan.kv_only_blocks, changed, width)]
    for place, blocks, replacements, mlp_width in parts:
        context.note(f"writing {len(blocks)} blocks" + (f", {quantized.label}" if quantized else ""))
        write(
            context.checkpoint,
            context.out / place,
            blocks,
            context.recipe.model.dtype,
            plan.model_dump(mode="json"),
            replacements=replacements,
            experts={block: kept for block, kept in plan.kept_experts(stage).items() if block in blocks},
            missing={block: lost for block, lost in plan.missing(stage).items() if block in blocks},
            mlp_width=mlp_width,
            files=files,
            note=context.note,
        )
    return {folder}
