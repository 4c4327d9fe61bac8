"""`pdtrim-deploy inspect`: the plan of a bundle, block by block, and its engines."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pdtrim_deploy.cli import options


@click.command()
@click.argument("bundle", type=options.path)
@click.option("--prompt-tokens", type=click.IntRange(1), help="Prompt length.  [default: the recipe's evaluation]")
@options.json_flag
def inspect(bundle: Path, prompt_tokens: int | None, as_json: bool) -> None:
    """Show what BUNDLE keeps, drops and sends, in bytes, and each engine in it.

    An engine is built, then checked, then run; under the table stands what was checked, where it has run, and what not.

    \b
    Examples:
      pdtrim-deploy inspect out/bundle --prompt-tokens 4096
      pdtrim-deploy inspect out/bundle --json
    """
    from pdtrim_deploy.bundle import Bundle

    opened = Bundle.open(bundle)
    plan, tokens = opened.plan, prompt_tokens or opened.recipe.evaluation.prompt_tokens
    if as_json:
        sizes = {"prompt_tokens": tokens, "dense": plan.dense_bytes(tokens), "planned": plan.payload_bytes(tokens)}
        data = {"digest": plan.digest, "plan": plan.model_dump(mode="json"), "bytes": sizes}
        data["steps"] = {n: s.seconds for n, s in opened.manifest.steps.items()}
        data["engines"] = {
            name: engine.model_dump(mode="json")
            | {"state": engine.state, "files": {n: e.model_dump() for n, e in opened.engine_files(name).items()}}
            for name, engine in opened.engines.items()
        }
        data["failures"] = opened.manifest.failures
        click.echo(json.dumps(data, indent=2))
        return
    from rich.console import Console

    from pdtrim_deploy.report.engine_table import engine_notes, engine_table
    from pdtrim_deploy.report.tables import plan_table

    Console().print(plan_table(plan, tokens))
    if opened.engines:
        Console().print(engine_table(opened.engines.values()))
        click.echo("\n".join(engine_notes(opened.engines.values())))
    for failure in opened.manifest.failures.values():
        click.echo(f"not built: {failure}")
