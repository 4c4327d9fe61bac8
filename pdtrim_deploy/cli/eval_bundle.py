"""`pdtrim-deploy eval BUNDLE`: the PD oracle judges both stages beside the dense model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pdtrim_deploy.cli import options
from pdtrim_deploy.cli.eval_questions import warn_of_calibrated
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.recipe.gates import LM_EVAL, SERVED_TASKS

if TYPE_CHECKING:
    from pdtrim_deploy.evaluation.lm_harness import Harness
    from pdtrim_deploy.evaluation.lm_harness.scoring import HandOver
    from pdtrim_deploy.evaluation.quality import Quality
    from pdtrim_deploy.evaluation.task_report import Figure, TasksReport
    from pdtrim_deploy.recipe import Recipe


def evaluate_bundle(
    command: str,
    bundle: Path,
    tasks: str | None,
    *,
    items: int | None,
    include_path: Path | None,
    hand_over: HandOver | None,
    corpus: str | None,
    sequences: int | None,
    seed: int | None,
    compute: Compute,
    compute_dtype: str | None,
    cache: Cache,
    dry_run: bool,
    as_json: bool,
) -> None:
    """What `eval` does with a bundle; SystemExit(1) when a gate is not kept."""
    from pdtrim_deploy.bundle import CARD, Bundle
    from pdtrim_deploy.bundle.environment import environment
    from pdtrim_deploy.cli.dry_run import say
    from pdtrim_deploy.cli.progress import Progress
    from pdtrim_deploy.doctor import CheckContext, require
    from pdtrim_deploy.local.atomic import write_atomic
    from pdtrim_deploy.pipeline.model_card import refresh_cards, refresh_recoveries

    _check(tasks, items, sequences)
    opened, progress = Bundle.open(bundle), Progress()
    section = {"corpus": corpus, "sequences": sequences, "seed": seed}
    overrides = {key: value for key, value in section.items() if value is not None}
    evaluation = opened.recipe.changed("command line", "evaluation", **overrides).evaluation
    dtype, chosen_dtype = str(opened.recipe.model.dtype), compute_dtype or opened.recipe.model.compute_dtype
    compute = compute.with_dtype(chosen_dtype) if chosen_dtype else compute.fast(dtype)
    require("eval", CheckContext(opened.recipe, cache=cache, compute=compute, judged_in=compute.dtype))
    names, harness = ([], None) if tasks is None else _tasks(opened.recipe, tasks, include_path, items, hand_over)
    if harness is None and (include_path is not None or hand_over is not None):
        raise UserError("--include-path and --hand-over are for tasks of lm-eval; give --tasks lm_eval:NAME too")
    path = options.writable(opened.reports_dir / ("eval.json" if tasks is None else "tasks.json"))
    for checkpoint in opened.checkpoints:
        options.writable(checkpoint / CARD)
    if dry_run:
        planned: dict[str, object] = {"source": opened.recipe.model.source, "plan": opened.plan.digest}
        planned |= {"evaluation": evaluation.model_dump(mode="json"), "written": str(path)}
        planned |= {"device": compute.names, "computed_in": compute.dtype}
        say(planned | ({} if tasks is None else {"tasks": tasks, "items": items}), as_json)
        return
    quality: Quality | None = None
    common = (cache, environment(command), evaluation)
    with progress.show("eval"):
        if tasks is None:
            from pdtrim_deploy.evaluation.quality import judge_bundle

            quality = judge_bundle(opened, *common, progress.note, compute)
            text, lines = quality.model_dump_json(indent=2), _perplexity(quality)
            kept = [quality.recovery] if quality.recovery else []
        else:
            from pdtrim_deploy.evaluation.judge_tasks import judge_tasks

            report = judge_tasks(opened, names, *common, items, progress.note, compute, harness)
            text, lines, kept = report.model_dump_json(indent=2), _figures(report), [*report.recovery]
    write_atomic(path, text + "\n")
    if quality is not None:
        refresh_cards(opened.path, quality)
    refresh_recoveries(opened.path, opened.plan.digest, opened.recipe.quality)
    lines += [f"  {row.sentence()}" for row in kept if row.gate is not None]
    if others := sorted(opened.recipe.quality.keys() - {row.task for row in kept}):
        lines.append(f"  gates of other tasks, not measured here: {', '.join(others)}")
    reason = "" if chosen_dtype else "this CPU has no instructions for it: "
    precision = dtype if compute.dtype == dtype else f"{dtype} ({reason}computed in {compute.dtype})"
    click.echo(text if as_json else "\n".join([*lines, f"  seed {evaluation.seed}, {precision}, saved in {path}"]))
    if any(row.passed is False for row in kept):
        raise SystemExit(1)


def _check(tasks: str | None, items: int | None, sequences: int | None) -> None:
    """UserError for options that do not go together."""
    if tasks is None and items is not None:
        raise UserError("--items is for tasks; give --tasks too, or --sequences instead")
    if tasks is not None and sequences is not None:
        raise UserError("--sequences is for the recipe's perplexity alone; with --tasks give --items")


def _tasks(
    recipe: Recipe, tasks: str, include_path: Path | None, items: int | None, hand_over: HandOver | None
) -> tuple[list[str], Harness | None]:
    """Our tasks of `--tasks`, each once, and those of lm-eval; UserError for one of ours that does not exist.

    Says which of them have questions that the bundle was calibrated on.
    """
    from pdtrim_deploy.evaluation.lm_harness import Harness
    from pdtrim_deploy.evaluation.tasks.registry import check

    names = list(dict.fromkeys(name.strip() for name in tasks.split(",")))
    harness_names = tuple(name.removeprefix(LM_EVAL) for name in names if name.startswith(LM_EVAL))
    task_names = [name for name in names if not name.startswith(LM_EVAL)]
    if "" in harness_names:
        raise UserError(f"--tasks: {LM_EVAL} names no task of lm-eval; give {LM_EVAL}NAME")
    for name in task_names:
        if name in SERVED_TASKS:
            raise UserError(
                f"{name} is generated by a running pair; serve the bundle, and give its URL: pdtrim-deploy eval URL "
                f"--tasks {name} --bundle BUNDLE --against DENSE_URL"
            )
        check(name)
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path: {include_path} is no folder; name the one that holds your task's YAML")
    warn_of_calibrated(recipe, names)
    return task_names, Harness(harness_names, include_path, items, hand_over) if harness_names else None


def _perplexity(quality: Quality) -> list[str]:
    """What `eval` prints without tasks."""
    text = quality.text
    return [
        f"perplexity of {quality.tokens} tokens after {text.prompt_tokens}-token prompts of {text.corpus}:",
        f"  dense {quality.dense.ppl:.4f}, PD {quality.pd.ppl:.4f}, ratio {quality.ratio:.4f}",
    ]


def _figures(report: TasksReport) -> list[str]:
    """What `eval` prints of tasks."""
    lines: list[str] = []
    for task in report.tasks:
        lines += [f"{task.task}, {len(task.groups)} items:", *map(_line, task.figures)]
    return lines


def _line(figure: Figure) -> str:
    """One figure; a perplexity as such, with its ratio and the interval of one standard error."""
    name = f"  {figure.measure} {figure.group or ''}".rstrip()
    if figure.measure == "nll":
        spread = "" if figure.stderr is None else f" (x/ {math.exp(figure.stderr):.4f})"
        return (
            f"{name:<18} perplexity dense {math.exp(figure.dense):.4f}, PD {math.exp(figure.pd):.4f}, "
            f"ratio {math.exp(figure.difference):.4f}{spread}"
        )
    spread = "" if figure.stderr is None else f" +- {figure.stderr:.4f}"
    return f"{name:<18} dense {figure.dense:.4f}, PD {figure.pd:.4f}, difference {figure.difference:+.4f}{spread}"
