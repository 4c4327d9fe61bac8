"""`pdtrim-deploy fidelity`: is the served pair the one that the plan describes?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pdtrim_deploy.cli import dry_run as dry_runs
from pdtrim_deploy.cli import options
from pdtrim_deploy.cli.interrupt import obey
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.recipe.seed import MOST_SEED
from pdtrim_deploy.serving.engines import Executors


@click.command()
@click.argument("bundle", type=options.path)
@click.argument("url", required=False)
@click.option("--new-tokens", type=click.IntRange(2), default=12, show_default=True, help="New tokens for each prompt.")
@click.option(
    "--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True, help="Seed that chooses the text."
)
@click.option("--deadline", type=options.seconds, default=120.0, show_default=True, help="Most seconds of a request.")
@options.executors
@options.device
@options.oracle_dtype
@options.serve_python
@options.cache_dir
@options.dry_run
@options.json_flag
@click.pass_obj
def fidelity(
    command: str,
    bundle: Path,
    url: str | None,
    new_tokens: int,
    seed: int,
    deadline: float,
    executors: Executors | None,
    compute: Compute,
    compute_dtype: str | None,
    serve_python: Path | None,
    cache: Cache,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compare the logprobs that the router at URL serves with the PD oracle of BUNDLE.

    Without URL, BUNDLE is served (1 prefill + 1 decode) during the check. The result is also written to
    BUNDLE/reports/fidelity.json. Exit code 1 when a logprob is off, or a wrong plan (a control) was not told apart.

    \b
    Examples:
      pdtrim-deploy fidelity out/bundle
      pdtrim-deploy fidelity out/bundle --prefill-executor onnxruntime
      pdtrim-deploy fidelity out/bundle http://127.0.0.1:8000 --json
    """
    from pdtrim_deploy.bundle import Bundle
    from pdtrim_deploy.bundle.environment import environment
    from pdtrim_deploy.doctor import CheckContext, require
    from pdtrim_deploy.loadtest import check_target
    from pdtrim_deploy.local.atomic import write_atomic
    from pdtrim_deploy.serving import ServeEnvironment, cluster_of

    if url:
        check_target(url, allow_remote=True)  # a few prompts are no load
    opened = Bundle.open(bundle)
    if url and executors is not None:
        raise UserError(f"--executor is for pairs that are started here, {url} runs already; leave one of them out")
    compute = _computing(opened.plan.model.kv_dtype, compute_dtype, compute)
    written = options.writable(opened.reports_dir / "fidelity.json")
    if dry_run:
        planned = {"plan": opened.plan.digest, "new_tokens": new_tokens, "seed": seed, "written": str(written)}
        planned |= {"device": compute.names, "computed_in": compute.dtype}
        at = {"url": url} if url else {"programs": dry_runs.programs(opened, executors, serve_python)}
        dry_runs.say(planned | at, as_json)
        return
    require("eval", CheckContext(opened.recipe, cache=cache, compute=compute, judged_in=compute.dtype))
    from pdtrim_deploy.evaluation.fidelity import FidelityResult, run_fidelity

    def say(sentence: str) -> None:
        obey()
        click.echo(sentence, err=True)

    def run(at: str) -> FidelityResult:
        return run_fidelity(
            opened, at, cache, new_tokens=new_tokens, seed=seed, deadline_s=deadline, progress=say, compute=compute
        )

    if url:
        result = run(url)
    else:
        require("serve", CheckContext(serve_python=serve_python))
        serve_environment = ServeEnvironment.find(serve_python)
        with cluster_of(
            opened, options=dry_runs.pair_options(opened), executors=executors, environment=serve_environment, say=say
        ) as cluster:
            result = run(cluster.url)
    provenance = {"seed": seed, "plan": opened.plan.digest, "environment": environment(command)}
    provenance |= {"device": compute.names, "computed_in": compute.dtype}
    text = json.dumps(result.to_json() | provenance, indent=2)
    write_atomic(written, text + "\n")
    if as_json:
        click.echo(text)
    else:
        _print(result)
    raise SystemExit(0 if result.passed else 1)


def _computing(dtype: str, chosen: str | None, compute: Compute) -> Compute:
    """`compute` in the `chosen` dtype; UserError for one that rounds otherwise than a pair of `dtype` does."""
    if chosen not in (None, dtype, "float32"):
        raise UserError(
            f"--compute-dtype {chosen}: the bundle's pair computes in {dtype}, and an oracle in {chosen} rounds "
            f"otherwise; give {' or '.join(dict.fromkeys([dtype, 'float32']))}"
        )
    return compute.with_dtype(chosen) if chosen else compute.fast(dtype)


def _print(result: Any) -> None:
    from rich.table import Table

    from pdtrim_deploy.cli.screen import console

    table = Table(
        title=f"Logprobs, served against oracle; allowed: {result.allowed.worst:.1e} nats on the worst prompt, "
        f"{result.allowed.typical:.1e} on the median of the long ones",
        title_justify="left",
    )
    for column in ("prompts", "number", "largest difference", "rounding alone"):
        table.add_column(column, justify="left" if column == "prompts" else "right")
    for group in dict.fromkeys(row.group for row in result.rows):
        rows = [row for row in result.rows if row.group == group]
        largest = (max(getattr(row, name) for row in rows) for name in ("error", "sensitivity"))
        table.add_row(group, str(len(rows)), *(f"{value:.1e}" for value in largest))
    for name, seen in result.controls_detected.items():
        size = result.control_sizes[name]
        table.add_row(f"wrong plan: {name}", "", f"{size.worst:.1e} {'told apart' if seen else 'NOT SEEN'}")
    out = console()
    out.print(table)
    for problem in result.problems:
        out.print(f"FAILED: {problem}", highlight=False)
