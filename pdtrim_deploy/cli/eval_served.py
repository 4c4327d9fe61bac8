"""`pdtrim-deploy eval URL`: answers that a running pair generates, beside the dense model's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pdtrim_deploy.cli import options
from pdtrim_deploy.cli.eval_questions import warn_of_calibrated
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.recipe.gates import LM_EVAL, SERVED_TASKS

if TYPE_CHECKING:
    from pdtrim_deploy.bundle import Bundle
    from pdtrim_deploy.evaluation.generated.endpoint import Endpoint
    from pdtrim_deploy.evaluation.generated.served import ServedReport

LIKELIHOODS = (
    "a served pair scores a likelihood's continuation as prompt, so that only prefill would be measured; name the "
    "bundle in place of the URL, and the PD oracle judges both stages"
)
CONCURRENCY = 8


def evaluate_served(
    command: str,
    url: str,
    tasks: str | None,
    *,
    items: int | None,
    against: str | None,
    of_bundle: Path | None,
    questions: Path | None,
    lengths: tuple[int, ...] | None,
    max_tokens: int | None,
    concurrency: int | None,
    out: Path | None,
    allow_remote: bool,
    cache: Cache,
    dry_run: bool,
    as_json: bool,
) -> None:
    """What `eval` does with a URL; SystemExit(1) when a gate is not kept."""
    from pdtrim_deploy.bundle import Bundle
    from pdtrim_deploy.bundle.environment import environment
    from pdtrim_deploy.cli.dry_run import say
    from pdtrim_deploy.cli.progress import Progress
    from pdtrim_deploy.evaluation.generated import TASKS
    from pdtrim_deploy.evaluation.generated.base import Setting
    from pdtrim_deploy.evaluation.generated.endpoint import Endpoint
    from pdtrim_deploy.evaluation.generated.gsm8k import from_file
    from pdtrim_deploy.evaluation.generated.lengths import check_contexts, choose
    from pdtrim_deploy.evaluation.generated.served import Pair, ServedReport
    from pdtrim_deploy.local.atomic import write_atomic
    from pdtrim_deploy.pipeline.model_card import refresh_recoveries

    names = _names(tasks)
    if questions is not None and "gsm8k" not in names:
        raise UserError("--questions are gsm8k's; give --tasks gsm8k too")
    chosen = choose(names, lengths, max_tokens)
    urls = _urls(url, against, allow_remote)
    bundle, progress = None if of_bundle is None else Bundle.open(of_bundle), Progress()
    gates = {} if bundle is None else bundle.recipe.quality
    if against is None and any(name in gates for name in names):
        raise UserError("the recipe has gates for these tasks, over the dense model's score; give its URL: --against")
    if bundle is not None:
        warn_of_calibrated(bundle.recipe, names)
    files = [] if bundle is None else [options.writable(bundle.reports_dir / "served.json")]
    files += [] if out is None else [out]
    read_questions = None if questions is None else from_file(questions)
    pair = Pair(url, against, concurrency or CONCURRENCY, max_tokens, items)
    if dry_run:
        written = [str(file) for file in files]
        say({"url": url, "against": against, "tasks": names, "items": items, "written": written}, as_json)
        return
    endpoints = [Endpoint.at(target) for target in urls]
    check_contexts(chosen, endpoints)
    if bundle is not None:
        _check_plan(endpoints[0], bundle)
    judged = []
    with progress.show("eval"):
        for name in names:
            task = TASKS[name]
            setting = Setting(cache, progress.note, chosen, max_tokens or task.max_tokens, endpoints[0].prompt_tokens)
            data = read_questions if name == "gsm8k" and read_questions is not None else task.load(setting)
            answers = None if bundle is None else bundle.reports_dir / "served" / f"{name}.jsonl"
            judged.append(pair.judge(task, data, gates, answers, progress.note))
    report = ServedReport(
        url=url,
        against=against,
        plan_digest=None if bundle is None else bundle.plan.digest,
        concurrency=pair.concurrency,
        tasks=tuple(judged),
        calibrated_on=() if bundle is None else bundle.recipe.calibrated_on(names),
        environment=environment(command),
    )
    text = report.model_dump_json(indent=2)
    for file in files:
        write_atomic(file, text + "\n")
    if bundle is not None:
        refresh_recoveries(bundle.path, bundle.plan.digest, bundle.recipe.quality)
    click.echo(text if as_json else "\n".join(lines(report)))
    if any(task.recovery is not None and task.recovery.passed is False for task in judged):
        raise SystemExit(1)


def lines(report: ServedReport) -> list[str]:
    """What `eval` prints of a report."""
    shown = []
    for task in report.tasks:
        spread = "" if task.stderr is None else f" +- {task.stderr:.4f}"
        cut = f", {task.truncated} answers cut at {task.max_tokens} tokens" if task.truncated else ""
        shown += [f"{task.task}, {task.questions} questions ({task.source}; licence: {task.licence}):"]
        shown += [f"  right {task.score:.4f}{spread}{cut}"]
        if task.dense is not None:
            paired = "" if task.difference_stderr is None else f" +- {task.difference_stderr:.4f}"
            shown += [f"  dense {task.dense:.4f}, difference {task.difference:+.4f}{paired}, McNemar's p {task.p:.3f}"]
        for group in task.groups:
            paired = (
                "" if group.difference is None else f", dense {group.dense:.4f}, difference {group.difference:+.4f}"
            )
            spread = "" if group.difference_stderr is None else f" +- {group.difference_stderr:.4f}"
            shown += [f"    {group.group}, {group.questions} questions: {group.score:.4f}{paired}{spread}"]
        if task.recovery is not None:
            shown += [f"  {task.recovery.sentence()}"]
    return shown


def _urls(url: str, against: str | None, allow_remote: bool) -> list[str]:
    """The pair's, then the dense model's; UserError for no URL, another machine's, or one for both."""
    from pdtrim_deploy.loadtest import check_target

    urls = [url] if against is None else [url, against]
    for target in urls:
        check_target(target, allow_remote)
    if against is not None and against.rstrip("/") == url.rstrip("/"):
        raise UserError(f"--against {against} is the pair itself; give the URL where the dense model is served")
    return urls


def _check_plan(endpoint: Endpoint, bundle: Bundle) -> None:
    """UserError where the workers serve another plan than the bundle's; a warning where they do not say which."""
    served = endpoint.plan_digest()
    if served is None:
        click.echo(f"{endpoint.url} does not say which plan it serves: not compared with {bundle.path}", err=True)
    elif served != bundle.plan.digest:
        raise UserError(
            f"{endpoint.url} serves plan {served[:12]}, and {bundle.path} has plan {bundle.plan.digest[:12]}; name the "
            "bundle that it serves, or leave --bundle out"
        )


def _names(tasks: str | None) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in (tasks or "").split(",")))
    if any(name.startswith(LM_EVAL) for name in names):
        raise UserError(LIKELIHOODS)
    for name in names:
        if name not in SERVED_TASKS:
            problem = f"{name!r} is no task of a URL" if name else "a URL needs tasks"
            raise UserError(f"{problem}; use --tasks with {', '.join(SERVED_TASKS)}, or name a bundle for the others")
    return names
