"""The part of `pdtrim-deploy plan` that counts workers: its options, as one argument, and what it prints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pdtrim_deploy.cli import options
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.recipe.bounds import MOST_SIMULATED
from pdtrim_deploy.recipe.seed import MOST_SEED

if TYPE_CHECKING:
    from pdtrim_deploy.simulation import SizedSide
    from pdtrim_deploy.sizing import Rates, Subject, Traffic
    from pdtrim_deploy.sizing.workers import Goal

ASSUMED = (
    "Poisson arrivals, workers taken in turns, every request as long as said, a pruned stage faster by its share of "
    "blocks, KV sent when the whole prompt is computed, no prefix cache"
)


@dataclass(frozen=True)
class Workers:
    """The options about workers; `typed` names those given on the command line, `files` is empty without --rates."""

    files: tuple[Path, ...]
    slo_ttft: float | None
    slo_itl: float | None
    rates_of: str
    link_each: bool
    simulate: bool
    requests: int
    seed: int
    typed: frozenset[str]

    def goal(self, traffic: Traffic) -> Goal | None:
        """The load for the workers; None without --rates, UserError when options that it needs are missing."""
        from pdtrim_deploy.sizing.workers import Goal

        if not self.files:
            if self.typed:
                raise UserError(
                    "--slo-ttft, --slo-itl, --rates-of, --link-each, --simulate, --requests and --seed are about "
                    "workers; give --rates too"
                )
            return None
        if not self.simulate and self.typed & {"requests", "seed"}:
            raise UserError("--requests and --seed are about a simulation; give --simulate too, or leave them out")
        if traffic.rate is None or self.slo_ttft is None or self.slo_itl is None:
            raise UserError(
                "--rates computes workers for a rate within an SLO; give --rate, --slo-ttft and --slo-itl too"
            )
        if traffic.prefill_tokens_per_s is not None:
            raise UserError("--prefill-tokens-per-s and --rates both set prefill's speed; leave one of them out")
        within = (self.slo_ttft, self.slo_itl, traffic.link, self.link_each, traffic.max_utilisation)
        return Goal(traffic.rate, traffic.isl, traffic.osl, *within)

    def unpruned(self, subjects: Sequence[Subject], tokens: int) -> Rates:
        """Rates of the unpruned model, from the files, which were measured at prompts of so many tokens."""
        from pdtrim_deploy.sizing import Rates

        rates = Rates.load(self.files)
        if self.rates_of == "dense":
            return rates
        if len(subjects) > 1:
            raise UserError(f"--rates-of planned with {len(subjects)} targets: which one was measured? Give one target")
        plan = subjects[0].plan
        return rates.scaled(1 / plan.prefill_share(tokens), 1 / plan.decode_share)

    def sides(self, subjects: Sequence[Subject], rates: Rates, goal: Goal) -> dict[str, SizedSide]:
        """By column: each model unpruned, and each plan."""
        from pdtrim_deploy.plan import PDPlan
        from pdtrim_deploy.simulation import sized

        sides, requests = {}, self.requests if self.simulate else 0
        for subject in subjects:
            dense = f"{subject.model} dense {subject.plan.model.row_dtype}"
            if dense not in sides:
                sides[dense] = sized(PDPlan.dense(subject.plan.model), rates, goal, requests, self.seed)
            if subject.kind != "config":
                sides[subject.name] = sized(subject.plan, rates, goal, requests, self.seed)
        return sides

    def report(self, sides: dict[str, SizedSide], rates: Rates, goal: Goal) -> None:
        """Print the table and its assumptions."""
        from pdtrim_deploy.cli.screen import console
        from pdtrim_deploy.report.workers_table import workers_table

        console().print(workers_table(sides, goal))
        for name, side in sides.items():
            if side.sizing.problem:
                click.echo(f"{name}: {side.sizing.problem}")
        click.echo(f"rates of one worker: {', '.join(map(str, self.files))}")
        for doubt in rates.doubts:
            click.echo(f"doubtful: {doubt}")
        pool = "without limit" if rates.pool_tokens is None else f"of {rates.pool_tokens} tokens"
        click.echo(
            f"limits of one worker: {rates.chunk_tokens} prompt tokens a batch, {rates.max_running} requests a decode "
            f"batch, a decode pool {pool}"
        )
        click.echo(f"assumed: {ASSUMED}")
        if any(side.simulated for side in sides.values()):
            click.echo(f"simulated, not measured: {self.requests} requests on these workers, seed {self.seed}")

    def as_json(self, sides: dict[str, SizedSide], rates: Rates, goal: Goal) -> dict[str, Any]:
        """The same for machines."""
        return {
            "rates": rates.model_dump(mode="json"),
            "slo": {"ttft_s": goal.ttft_s, "itl_s": goal.itl_s, "share": 0.95},
            "link_each": goal.link_each,
            "assumed": ASSUMED,
            "sides": {name: side.model_dump(mode="json") for name, side in sides.items()},
        }


def workers_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Eight options, passed on as one argument `workers`."""

    @functools.wraps(command)
    def wrapped(*args: Any, **arguments: Any) -> Any:
        names = ("files", "slo_ttft", "slo_itl", "rates_of", "link_each", "simulate", "requests", "seed")
        source = click.get_current_context().get_parameter_source
        typed = frozenset(name for name in names if source(name) is ParameterSource.COMMANDLINE)
        worker_options = {name: arguments.pop(name) for name in names} | {"typed": typed}
        return command(*args, workers=Workers(**worker_options), **arguments)

    rates_help = (
        "How fast one worker is: YAML, or results of loadtest --json and YAML of limits. Counts workers; needs --rate "
        "and the next two."
    )
    for option in (
        click.option(
            "--seed",
            type=click.IntRange(0, MOST_SEED),
            default=0,
            show_default=True,
            help="Seed of the simulated arrivals.",
        ),
        click.option(
            "--requests",
            type=click.IntRange(1, MOST_SIMULATED),
            default=20000,
            show_default=True,
            help="Requests to simulate.",
        ),
        click.option("--simulate", is_flag=True, help="Also simulate these workers."),
        click.option(
            "--link-each", is_flag=True, help="Each prefill worker has a link of its own, instead of one link for all."
        ),
        click.option("--rates-of", type=click.Choice(["dense", "planned"]), default="dense", show_default=True),
        click.option("--slo-itl", type=options.Duration(), help="ITL of 95% of the requests."),
        click.option("--slo-ttft", type=options.Duration(), help="TTFT of 95% of the requests: 500ms, 2s."),
        click.option("--rates", "files", type=options.path, multiple=True, help=rates_help),
    ):
        wrapped = option(wrapped)
    return wrapped
