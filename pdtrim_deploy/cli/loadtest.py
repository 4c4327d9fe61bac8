"""`pdtrim-deploy loadtest`: put a served pair under load."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import click
from click.core import ParameterSource

from pdtrim_deploy.cli import dry_run as dry_runs
from pdtrim_deploy.cli import options
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.recipe.bounds import MOST_REQUESTS, MOST_SECONDS
from pdtrim_deploy.recipe.seed import MOST_SEED
from pdtrim_deploy.serving.engines import Executors

ADHOC = ("requests", "concurrency", "prompt_tokens", "output_tokens", "warmup", "deadline", "seed")


@click.command()
@click.argument("target", metavar="URL|BUNDLE")
@click.option(
    "--scenario", "scenario_file", type=options.path, help="YAML, see scenarios/; replaces the next seven options."
)
@click.option("--requests", type=options.some_requests, default=32, show_default=True)
@click.option("--concurrency", type=options.some_clients, default=4, show_default=True)
@click.option("--prompt-tokens", type=options.Lengths(), default="320", show_default=True)
@click.option("--output-tokens", type=options.Lengths(), default="24", show_default=True)
@click.option(
    "--warmup",
    type=click.IntRange(0, MOST_REQUESTS),
    default=2,
    show_default=True,
    help="Requests before the measurement starts.",
)
@click.option(
    "--deadline",
    type=options.FiniteRange(0, MOST_SECONDS, min_open=True),
    default=300.0,
    show_default=True,
    help="Seconds that a request may take.",
)
@click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True)
@click.option("--driver", "driver_name", default="builtin", show_default=True, help="builtin or aiperf.")
@click.option(
    "--worker", "workers", multiple=True, metavar="URL", help="Worker of a running pair whose /metrics are read."
)
@click.option("--allow-remote", is_flag=True, help="Allow a target that is not on this machine.")
@options.executors
@options.serve_python
@options.dry_run
@options.json_flag
@click.pass_context
def loadtest(
    ctx: click.Context,
    target: str,
    scenario_file: Path | None,
    requests: int,
    concurrency: int,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    warmup: int,
    deadline: float,
    seed: int,
    driver_name: str,
    workers: tuple[str, ...],
    allow_remote: bool,
    executors: Executors | None,
    serve_python: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Put a served pair under load.

    URL is its router's; a BUNDLE is served (1 prefill + 1 decode) during the test.
    Exit code 1 when a request failed.

    \b
    Examples:
      pdtrim-deploy loadtest http://127.0.0.1:8000 --requests 64 --concurrency 8
      pdtrim-deploy loadtest out/bundle --scenario scenarios/chat.yaml --json
    """
    from pdtrim_deploy.cli.progress import Progress
    from pdtrim_deploy.cli.screen import console
    from pdtrim_deploy.cli.target import Target
    from pdtrim_deploy.loadtest import LoadResult, Scenario, Workers, check_scenario, check_target, driver

    if scenario_file is not None:
        adhoc = [name for name in ADHOC if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if adhoc:
            option_names = ", ".join(f"--{name.replace('_', '-')}" for name in adhoc)
            raise UserError(
                f"{option_names}: --scenario {scenario_file} sets that; change it there, or leave --scenario out"
            )
        scenario = Scenario.load(scenario_file)
    else:
        scenario = Scenario.closed(
            requests, concurrency, prompt_tokens, output_tokens, warmup=warmup, deadline_s=deadline, seed=seed
        )
    drive, progress = driver(driver_name), Progress()
    check_scenario(driver_name, scenario)
    put = Target.of(target, executors, serve_python, allow_remote)
    if workers and put.bundle is not None:
        raise UserError(
            f"--worker is for a running pair; the workers of {target} are started and read anyway; leave it out"
        )
    for url in workers:
        check_target(url, allow_remote)
    if dry_run:
        scenario_json = scenario.model_dump(mode="json", exclude_none=True)
        dry_runs.say({"driver": driver_name, "scenario": scenario_json, **put.described()}, as_json)
        return
    put.check()
    with ExitStack() as stack:
        url, counters = put.up(stack, progress, target)
        if workers:
            counters = Workers(tuple(f"{worker_url.rstrip('/')}/metrics" for worker_url in workers))
        with progress.show("load"):
            result = LoadResult.measure(drive, driver_name, url, scenario, counters)
    if as_json:
        click.echo(json.dumps(result.model_dump(mode="json"), indent=2))
    else:
        from pdtrim_deploy.report.tables import load_table

        console().print(load_table({target: result}))
        for kind, detail in result.failure_details.items():
            click.echo(f"{kind}: {detail}")
        if result.client.bottleneck:
            click.echo(result.client.bottleneck)
    raise SystemExit(1 if result.failed else 0)
