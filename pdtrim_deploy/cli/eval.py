"""`pdtrim-deploy eval`: how much quality a bundle loses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pdtrim_deploy.cli import options
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.recipe.seed import MOST_SEED

if TYPE_CHECKING:
    from pdtrim_deploy.evaluation.quality import Quality
    from pdtrim_deploy.evaluation.tasks.report import Figure


@click.command("eval")
@click.argument("bundle", type=options.path)
@click.option("--tasks", help="Some of perplexity,choice,needle,agreement.  [default: the recipe's perplexity alone]")
@click.option("--items", type=click.IntRange(1), help="Items of each task (needle: per depth).  [default: the task's]")
@click.option("--corpus", help="brown, code, dir:PATH, jsonl:PATH ... as in recipes.  [default: the recipe's]")
@click.option(
    "--sequences", type=click.IntRange(1), help="Sequences to judge; not with --tasks.  [default: the recipe's]"
)
@click.option(
    "--seed", type=click.IntRange(0, MOST_SEED), help="Seed that chooses text and items.  [default: the recipe's]"
)
@options.device
@options.compute_dtype
@options.cache_dir
@options.dry_run
@options.json_flag
@click.pass_obj
def evaluate(
    command: str,
    bundle: Path,
    tasks: str | None,
    items: int | None,
    corpus: str | None,
    sequences: int | None,
    seed: int | None,
    compute: Compute,
    compute_dtype: str | None,
    cache: Cache,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measure perplexity on held-out text, or --tasks, of the dense model and of the pair.

    Both continue the same prompts. The result is also written to BUNDLE/reports/eval.json (tasks.json), with seed,
    corpus, command and machine, and into the model cards of both stages.

    \b
    Examples:
      pdtrim-deploy eval out/bundle
      pdtrim-deploy eval out/bundle --tasks perplexity,choice,needle,agreement --json
    """
    from pdtrim_deploy.bundle import CARD, Bundle, write_atomic
    from pdtrim_deploy.bundle.environment import environment
    from pdtrim_deploy.cli.dry_run import say
    from pdtrim_deploy.cli.progress import Progress
    from pdtrim_deploy.doctor import CheckContext, require
    from pdtrim_deploy.pipeline.model_card import refresh_cards
    from pdtrim_deploy.plan import STAGES

    if tasks is None and items is not None:
        raise UserError("--items is for tasks; give --tasks too, or --sequences instead")
    if tasks is not None and sequences is not None:
        raise UserError("--sequences is for the recipe's perplexity alone; with --tasks give --items")
    opened, progress = Bundle.open(bundle), Progress()
    given = {"corpus": corpus, "sequences": sequences, "seed": seed}
    overrides = {key: value for key, value in given.items() if value is not None}
    evaluation = opened.recipe.changed("command line", "evaluation", **overrides).evaluation
    require("eval", CheckContext(opened.recipe, cache=cache, compute=compute))
    names = [] if tasks is None else _names(tasks)
    dtype, chosen_dtype = str(opened.recipe.model.dtype), compute_dtype or opened.recipe.model.compute_dtype
    compute = compute.with_dtype(chosen_dtype) if chosen_dtype else compute.fast(dtype)
    path = options.writable(opened.reports_dir / ("tasks.json" if names else "eval.json"))
    for stage in () if names else STAGES:
        options.writable(opened.stage_dir(stage) / CARD)
    if dry_run:
        planned: dict[str, object] = {"source": opened.recipe.model.source, "plan": opened.plan.digest}
        planned |= {"evaluation": evaluation.model_dump(mode="json"), "written": str(path)}
        planned |= {"device": compute.names, "computed_in": compute.dtype}
        say(planned | ({"tasks": names, "items": items} if names else {}), as_json)
        return
    quality: Quality | None = None
    with progress.show("eval"):
        if tasks is None:
            from pdtrim_deploy.evaluation.quality import judge_bundle

            quality = judge_bundle(opened, cache, environment(command), evaluation, progress.note, compute)
            text = quality.model_dump_json(indent=2)
            lines = [
                f"perplexity of {quality.tokens} tokens after {evaluation.prompt_tokens}-token prompts of "
                f"{evaluation.corpus}:",
                f"  dense {quality.dense.ppl:.4f}, PD {quality.pd.ppl:.4f}, ratio {quality.ratio:.4f}",
            ]
        else:
            from pdtrim_deploy.evaluation.tasks.report import judge_tasks

            report = judge_tasks(opened, names, cache, environment(command), evaluation, items, progress.note, compute)
            text = report.model_dump_json(indent=2)
            lines = []
            for task in report.tasks:
                lines += [f"{task.task}, {len(task.groups)} items:", *map(_line, task.figures)]
    write_atomic(path, text + "\n")
    if quality is not None:
        refresh_cards(bundle, quality)
    if as_json:
        click.echo(text)
        return
    reason = "" if chosen_dtype else "this CPU has no instructions for it: "
    precision = dtype if compute.dtype == dtype else f"{dtype} ({reason}computed in {compute.dtype})"
    click.echo("\n".join([*lines, f"  seed {evaluation.seed}, {precision}, saved in {path}"]))


def _names(tasks: str) -> list[str]:
    """Those of `--tasks`, each once; UserError for one that does not exist."""
    from pdtrim_deploy.evaluation.tasks.registry import check

    names = list(dict.fromkeys(name.strip() for name in tasks.split(",")))
    for name in names:
        check(name)
    return names


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
