"""`pdtrim-deploy loadtest`: put a served pair under load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click


class Lengths(click.ParamType):
    """`320`, or `200-400` for lengths drawn evenly from 200 to 400."""

    name = "N|LOW-HIGH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """(low, high), 1 <= low <= high."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", value)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high:
            self.fail(f"{value!r} is neither a length such as 320 nor a range such as 200-400", param, ctx)
        return low, high


@click.command()
@click.argument("target", metavar="URL|BUNDLE")
@click.option("--requests", type=click.IntRange(1), default=32, show_default=True)
@click.option("--concurrency", type=click.IntRange(1), default=4, show_default=True)
@click.option("--prompt-tokens", type=Lengths(), default="320", show_default=True)
@click.option("--output-tokens", type=Lengths(), default="24", show_default=True)
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
@click.option("--json", "as_json", is_flag=True, help="The whole result as JSON.")
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
    as_json: bool,
) -> None:
    r"""Load the router at URL, or serve BUNDLE (1 prefill + 1 decode) for the length of the test.

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
        check_target(target, allow_remote)
        runs = [drive(target, spec)]
    else:
        from pdtrim_deploy.bundle import Bundle
        from pdtrim_deploy.serving import cluster_of

        with cluster_of(Bundle.open(Path(target))) as cluster:
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
