"""`pdtrim-deploy inspect`: the plan of a bundle, block by block."""

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
    """Show what BUNDLE keeps, drops and sends, in bytes."""
    from pdtrim_deploy.bundle import Bundle

    opened = Bundle.open(bundle)
    plan, tokens = opened.plan, prompt_tokens or opened.recipe.evaluation.prompt_tokens
    if as_json:
        sizes = {"prompt_tokens": tokens, "dense": plan.dense_bytes(tokens), "planned": plan.payload_bytes(tokens)}
        data = {"digest": plan.digest, "plan": plan.model_dump(mode="json"), "bytes": sizes}
        click.echo(json.dumps(data | {"steps": {n: s.seconds for n, s in opened.manifest.steps.items()}}, indent=2))
        return
    from rich.console import Console

    from pdtrim_deploy.report.tables import plan_table

    Console().print(plan_table(plan, tokens))
