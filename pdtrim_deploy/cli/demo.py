"""`pdtrim-deploy demo`: the whole way through the house, with figures at the end."""

from __future__ import annotations

from pathlib import Path

import click

from pdtrim_deploy.cli import options
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.recipe.bounds import MOST_ROUNDS
from pdtrim_deploy.recipe.seed import MOST_SEED


@click.command()
@click.argument("recipe_file", metavar="RECIPE", type=options.path)
@click.option("--out", type=options.path, required=True, help="Folder for bundles, logs and report.")
@click.option(
    "--requests", type=options.some_requests, default=16, show_default=True, help="Of each pair, in all rounds."
)
@click.option("--concurrency", type=options.some_clients, default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(1, MOST_ROUNDS), default=8, show_default=True, help="Turns of each pair.")
@click.option("--prompt-tokens", type=options.Lengths(), default="320", show_default=True)
@click.option("--output-tokens", type=options.Lengths(), default="24", show_default=True)
@click.option(
    "--link",
    default="50Mbps",
    show_default=True,
    help="Speed between prefill and decode, for KV of a bfloat16 pool; or none.",
)
@click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True)
@click.option("--dry-run", is_flag=True, help="Say what the pruned bundle's build would do and how large it gets.")
@click.option("--pareto", type=options.path, help="benchmarks/results/kv.json, for the page.")
@click.option("--faults", type=options.path, help="benchmarks/results/faults.json, for the page.")
@options.serve_python
@options.cache_dir
@options.json_flag
@click.pass_obj
def demo(
    command: str,
    recipe_file: Path,
    out: Path,
    requests: int,
    concurrency: int,
    rounds: int,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    link: str,
    seed: int,
    dry_run: bool,
    pareto: Path | None,
    faults: Path | None,
    serve_python: Path | None,
    cache: Cache,
    as_json: bool,
) -> None:
    """Build, judge, serve, check and load-test RECIPE and its dense model.

    The figures are written to OUT/report/metrics.json, and on one page to OUT/report/report.html. KV of both pairs goes
    through a relay on loopback that limits the speed to --link. At 50 Mb/s the KV of a dense prompt of SmolLM2-135M
    takes about as long as its prefill on two CPU cores; for Llama-3.1-8B on an H100 that is so at 25 Gb/s (arithmetic).
    Exit code 1 when the served pair is not what the plan says, a request failed, or an engine could not be built.

    \b
    Examples:
      pdtrim-deploy demo recipes/smollm2-demo.yaml --out out/demo
      pdtrim-deploy demo recipes/smollm2-quick.yaml --out out/quick --requests 8 --json
    """
    from pdtrim_deploy.bundle import Bundle
    from pdtrim_deploy.cli.demo_run import Demo
    from pdtrim_deploy.cli.progress import Progress
    from pdtrim_deploy.cli.screen import console
    from pdtrim_deploy.doctor import CheckContext, require
    from pdtrim_deploy.loadtest import Scenario
    from pdtrim_deploy.loadtest.rounds import check_dealt
    from pdtrim_deploy.local.atomic import write_atomic
    from pdtrim_deploy.recipe import Recipe
    from pdtrim_deploy.report.html import Findings, page, read_faults, read_pareto
    from pdtrim_deploy.report.savings import savings_table
    from pdtrim_deploy.serving.relay import MOST_BITS_PER_S, relayed_link

    check_dealt(requests, rounds)
    slow = None if link == "none" else relayed_link(link, MOST_BITS_PER_S / 2)  # twice that for a float32 pool
    recipe, progress = Recipe.load(recipe_file), Progress()
    if recipe.stages == "unified":
        raise UserError(
            f"{recipe_file} asks for one model for both stages, but the demo measures a pair's KV; build it, and "
            "`compare` it with another bundle"
        )
    if dry_run:
        from pdtrim_deploy.cli.build import print_preview
        from pdtrim_deploy.pipeline.preview import preview

        print_preview(preview(recipe, out / "pruned", cache), out / "pruned", as_json)
        return
    for path, read in ((pareto, read_pareto), (faults, read_faults)):
        if path is not None:
            read(path)  # a wrong file is said now, not after the load
    require("demo", CheckContext(recipe, out, cache, serve_python))
    load = Scenario.closed(requests, concurrency, prompt_tokens, output_tokens, seed=seed)
    metrics = Demo(recipe, out, cache, load, command, progress.show, progress.note, rounds, serve_python, slow).run()
    written = out / "report" / "report.html"
    write_atomic(written, page(Findings.of(Bundle.open(out / "pruned"), pareto=pareto, faults=faults), command))
    if as_json:
        click.echo(metrics.model_dump_json(indent=2))
    else:
        console().print(savings_table(metrics))
        click.echo(f"written to {out / 'report' / 'metrics.json'} by: {command}")
        click.echo(f"page: {written}")
    for sentence in metrics.dropped:
        click.echo(sentence, err=True)
    for name, figures in metrics.load.items():
        if figures.detail.client.bottleneck:
            click.echo(f"{name}: {figures.detail.client.bottleneck}", err=True)
    problems = [*metrics.problems, *Bundle.open(out / "pruned").manifest.failures.values()]
    for problem in problems:
        click.echo(f"problem: {problem}", err=True)
    raise SystemExit(1 if problems else 0)
