"""`pdtrim-deploy doctor`: what this machine can build and serve."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pdtrim_deploy.cli import options
from pdtrim_deploy.doctor.base import ALL
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import Compute

COLOURS = {"ok": "green", "missing": "red", "wrong version": "red"}


@click.command()
@click.argument("recipe_file", metavar="[RECIPE]", type=options.path, required=False)
@click.option("--for", "job", type=click.Choice(ALL), default="demo", show_default=True)
@click.option("--out", type=options.path, default=Path(), help="Where the bundle would go.  [default: here]")
@options.priced_device
@options.serve_python
@click.option("--deep", is_flag=True, help="Also load the plugin into SGLang, as a worker does; takes half a minute.")
@options.cache_dir
@options.json_flag
def doctor(
    recipe_file: Path | None,
    job: str,
    out: Path,
    compute: Compute,
    serve_python: Path | None,
    deep: bool,
    cache: Cache,
    as_json: bool,
) -> None:
    """Report what this machine can build and serve, what is missing, and how to add it.

    With RECIPE, also check whether memory and disk suffice, and estimate what each step of the build takes. Times
    count a step's matrix products at the rate of this machine, which is measured in a second. For a --device that this
    machine lacks, only memory, disk and the time for files are estimated. A status in brackets is that of an optional
    part. Exit code 0 when the job can run, 1 when not.

    \b
    Examples:
      pdtrim-deploy doctor
      pdtrim-deploy doctor recipes/smollm2-demo.yaml --out out/demo
      pdtrim-deploy doctor recipes/llama-3.1-8b-pruned.yaml --memory 24GB
      pdtrim-deploy doctor --for serve --deep --json
    """
    from pdtrim_deploy.cli.progress import Progress
    from pdtrim_deploy.doctor import CheckContext, Finding, examine, first_failures
    from pdtrim_deploy.doctor import as_json as dump
    from pdtrim_deploy.recipe import Recipe

    recipe = Recipe.load(recipe_file) if recipe_file else None
    context = CheckContext(recipe, out, cache, serve_python, deep, compute=compute, priced=True)
    findings: list[Finding] = []
    group = ""
    if deep:
        Progress().note("loading the plugin into SGLang takes half a minute")
    for finding in examine(context, job):  # type: ignore[arg-type]
        findings.append(finding)
        if as_json:
            continue
        if finding.group != group:
            group = finding.group
            click.secho(group, bold=True)
        status = finding.status if finding.needed_by or finding.status == "ok" else f"[{finding.status}]"
        colour = COLOURS[finding.status] if finding.needed_by or finding.status == "ok" else "yellow"
        click.echo(f"  {click.style(f'{status:<15}', fg=colour)} {finding.name:<22} {finding.detail}")
        if finding.mend:
            click.echo(f"  {'':<15} {'':<22} -> {finding.mend}")
    failures = first_failures(findings, job)  # type: ignore[arg-type]
    if as_json:
        click.echo(json.dumps(dump(findings, job), indent=2))  # type: ignore[arg-type]
    elif failures:
        click.echo(f"{job}: cannot run, {len(failures)} of {len(findings)} lines to fix")
    else:
        click.echo(f"{job}: can run")
    raise SystemExit(1 if failures else 0)
