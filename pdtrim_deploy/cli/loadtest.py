"""`pdtrim-deploy loadtest`: put a served pair under load."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pdtrim_deploy.cli import options
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.serving.engines import Executors


@click.command()
@click.argument("target", metavar="URL|BUNDLE")
@click.option("--requests", type=click.IntRange(1), default=32, show_default=True)
@click.option("--concurrency", type=click.IntRange(1), default=4, show_default=True)
@click.option("--prompt-tokens", type=options.Lengths(), default="320", show_default=True)
@click.option("--output-tokens", type=options.Lengths(), default="24", show_default=True)
@click.option(
    "--warmup", type=click.IntRange(0), default=2, show_default=True, help="Requests before the clock starts."
)
@click.option(
    "--deadline",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    help="Seconds that a request may take.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--driver", "driver_name", default="builtin", show_default=True)
@click.option("--allow-remote", is_flag=True, help="Allow a target that is not on this machine.")
@options.executors
@options.json_flag
def loadtest(
    target: str,
    requests: int,
    concurrency: int,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    warmup: int,
    deadline: float,
    seed: int,
    driver_name: str,
    allow_remote: bool,
    executors: Executors | None,
    as_json: bool,
) -> None:
    """Put a served pair under load.

    URL is that of its router; a BUNDLE is served (1 prefill + 1 decode) for the length of the test.
    Exit code 1 when a request failed.

    \b
    Examples:
      pdtrim-deploy loadtest http://127.0.0.1:8000 --requests 64 --concurrency 8
      pdtrim-deploy loadtest out/bundle --prompt-tokens 200-400 --json
    """
    from rich.console import Console

    from pdtrim_deploy.loadtest import LoadResult, LoadSpec, check_target, driver

    spec = LoadSpec(requests, concurrency, prompt_tokens, output_tokens, warmup, deadline, seed)
    drive = driver(driver_name)
    if "://" in target:
        if executors is not None:
            raise UserError(f"--executor is for pairs started here, {target} runs already; leave one of them out")
        check_target(target, allow_remote)
        runs = [drive(target, spec)]
    else:
        from pdtrim_deploy.bundle import Bundle
        from pdtrim_deploy.serving import cluster_of

        with cluster_of(Bundle.open(Path(target)), executors=executors) as cluster:
            runs = [drive(cluster.url, spec)]
    result = LoadResult.of(driver_name, runs)
    if as_json:
        click.echo(json.dumps(result.model_dump(mode="json"), indent=2))
    else:
        from pdtrim_deploy.report.tables import load_table

        Console().print(load_table({target: result}))
        for kind, detail in result.failure_details.items():
            click.echo(f"{kind}: {detail}")
    raise SystemExit(1 if result.failed else 0)
