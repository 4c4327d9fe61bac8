"""`pdtrim-deploy eval`: dense and PD perplexity of a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from pdtrim_deploy.cache import Cache
from pdtrim_deploy.cli import options


@click.command("eval")
@click.argument("bundle", type=options.path)
@click.option("--corpus", help="brown, austen, dir:PATH or file:PATH.  [default: the recipe's]")
@click.option("--sequences", type=click.IntRange(1), help="[default: the recipe's]")
@click.option("--seed", type=click.IntRange(0), help="Chooses the text.  [default: the recipe's]")
@options.cache_dir
@options.json_flag
@click.pass_obj
def evaluate(
    command: str, bundle: Path, corpus: str | None, sequences: int | None, seed: int | None, cache: Cache, as_json: bool
) -> None:
    """Perplexity on held-out text, dense and behind the plan.

    Both continue the same prompts. Written to BUNDLE/reports/eval.json too, with seed, corpus, command and machine.
    """
    from pdtrim_deploy.bundle import Bundle, write_atomic
    from pdtrim_deploy.cli.progress import Progress
    from pdtrim_deploy.evaluation.quality import judge_bundle
    from pdtrim_deploy.report.environment import environment

    opened, progress = Bundle.open(bundle), Progress()
    given = {"corpus": corpus, "sequences": sequences, "seed": seed}
    said = {key: value for key, value in given.items() if value is not None}
    asked = opened.recipe.changed("command line", "evaluation", **said).evaluation
    with progress.show("eval"):
        quality = judge_bundle(opened, cache, environment(command), asked, progress.note)
    text = quality.model_dump_json(indent=2)
    write_atomic(opened.reports_dir / "eval.json", text + "\n")
    if as_json:
        click.echo(text)
        return
    click.echo(f"perplexity of {quality.tokens} tokens behind {asked.prompt_tokens}-token prompts of {asked.corpus}:")
    click.echo(f"  dense {quality.dense.ppl:.4f}, PD {quality.pd.ppl:.4f}, ratio {quality.ratio:.4f}")
    click.echo(f"  seed {asked.seed}, {quality.dtype}, saved in {opened.reports_dir / 'eval.json'}")
