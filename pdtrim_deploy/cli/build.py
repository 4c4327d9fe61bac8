"""`pdtrim-deploy build`: recipe -> bundle."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pdtrim_deploy.cli import options
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import Compute
from pdtrim_deploy.local.duration import duration
from pdtrim_deploy.recipe.bounds import MOST_WORKERS

if TYPE_CHECKING:
    from pdtrim_deploy.pipeline.preview import Preview


@click.command()
@click.argument("recipe_file", metavar="RECIPE", type=options.path)
@click.option("--out", type=options.path, required=True, help="Folder of the bundle.")
@options.priced_device
@options.compute_dtype
@options.cache_dir
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the steps and sizes; write nothing except the digest of the weights, to the cache.",
)
@click.option("--force", is_flag=True, help="Run every step again, except for results in the cache.")
@click.option(
    "--workers", type=options.some_workers, default=1, show_default=True, help="Ray workers for the pruning search."
)
@click.option("--ray-address", metavar="HOST:PORT", help="Head of a Ray cluster.  [default: Ray on this machine]")
@click.option(
    "--worker-gpus", type=options.FiniteRange(0, MOST_WORKERS), default=0.0, show_default=True, help="GPUs per worker."
)
@options.json_flag
def build(
    recipe_file: Path,
    out: Path,
    compute: Compute,
    compute_dtype: str | None,
    cache: Cache,
    dry_run: bool,
    force: bool,
    workers: int,
    ray_address: str | None,
    worker_gpus: float,
    as_json: bool,
) -> None:
    """Prune a model and write both stages, and their engines, as a sealed bundle.

    A build that was interrupted resumes when the same command is run again. Students and healed weights are cached by
    everything that they depend on, and --force reuses them; to compute them again, give another --cache-dir.
    Another --device chooses the same blocks and KV, unless the losses of candidates differ only by rounding; a build
    that was interrupted may resume on another --device or with another --memory.
    With --workers, --ray-address or --worker-gpus, Ray workers evaluate the candidates of the pruning search, each
    with its own copy of the model; they choose the same blocks as one process.
    Exit code 1 when an engine of the recipe's targets could not be built; the bundle is complete without it.

    \b
    Examples:
      pdtrim-deploy build recipes/smollm2-demo.yaml --out out/bundle
      pdtrim-deploy build recipes/smollm2-demo.yaml --out out/bundle --dry-run
      pdtrim-deploy build recipes/smollm2-demo.yaml --out out/bundle --workers 2
      pdtrim-deploy build recipes/smollm2-demo.yaml --out out/bundle --device cpu
    """
    from pdtrim_deploy.recipe import Recipe

    recipe = Recipe.load(recipe_file)
    if compute_dtype is not None:
        recipe = recipe.changed("command line", "model", compute_dtype=compute_dtype)
    shared = workers > 1 or bool(ray_address or worker_gpus)
    if shared:
        from pdtrim_deploy.pipeline.recipe_fit import check_shared

        check_shared(recipe)
    if dry_run:
        from pdtrim_deploy.pipeline.preview import preview

        print_preview(preview(recipe, out, cache, compute), out, as_json)
        return
    from pdtrim_deploy.cli.progress import Progress
    from pdtrim_deploy.doctor import CheckContext, require
    from pdtrim_deploy.pipeline import build as run

    here = workers if shared and not ray_address else 0
    require("build", CheckContext(recipe, out, cache, workers=here, compute=compute))
    progress = Progress()
    search_workers = None
    if shared:
        from pdtrim_deploy.pruning.ray_evaluator import Workers, check_installed

        check_installed()
        search_workers = Workers(workers, ray_address, worker_gpus)
    bundle = run(
        recipe, out, cache, progress.note, show=progress.show, force=force, workers=search_workers, compute=compute
    )
    if as_json:
        click.echo(
            json.dumps(
                {
                    "bundle": str(out),
                    "plan_digest": bundle.plan.digest,
                    "recipe_digest": recipe.digest,
                    "engines": list(bundle.engines),
                    "failures": bundle.manifest.failures,
                }
            )
        )
    else:
        from pdtrim_deploy.models.config import read_config
        from pdtrim_deploy.models.weights import ModelSizes
        from pdtrim_deploy.pipeline.engines import summary
        from pdtrim_deploy.pipeline.fit_tokens import fit_sentence

        for engine in bundle.engines.values():
            click.echo(f"{out}: {summary(engine)}")
        if short := fit_sentence(recipe, ModelSizes.of(read_config(bundle.decode_dir / "config.json"))):
            click.echo(f"{out}: {short}")
        click.echo(f"{out}: plan {bundle.plan.digest}")
        place = shlex.quote(str(out))
        click.echo(f"next: pdtrim-deploy inspect {place}; pdtrim-deploy eval {place}; pdtrim-deploy serve {place}")
    for failure in bundle.manifest.failures.values():
        click.echo(f"pdtrim-deploy: {failure}", err=True)
    raise SystemExit(1 if bundle.manifest.failures else 0)


def print_preview(preview: Preview, out: Path, as_json: bool) -> None:
    """Print the result of `--dry-run`."""
    rates = preview.rates
    if as_json:
        data = asdict(preview) | {"recipe": preview.recipe.model_dump(mode="json")}
        data["seconds"] = {name: rates.seconds(cost) for name, cost in preview.left.items()} if rates else {}
        click.echo(json.dumps(data, indent=2))
        return
    click.echo(f"{out}: nothing is written (--dry-run)")
    wide = max(map(len, preview.steps))
    for name, done in preview.steps.items():
        click.echo(f"  {name:<{wide}} {'done ' if done else 'to do'}{_cost(preview, name)}".rstrip())
    if rates is not None and preview.left:
        click.echo(f"  {rates.sentence(preview.left)}")
    if preview.limits is not None:
        click.echo(f"  {preview.limits}")
    if preview.search is not None:
        cost = preview.search
        click.echo(
            f"  search     {cost.most:,} block-forwards at most, likely {cost.likely:,}: {_at(preview.search_seconds)}"
        )
        click.echo(
            f"             {cost.memory / 1e9:,.2f} GB: weights {cost.weights / 1e9:,.2f}, hidden states "
            f"{cost.states / 1e9:,.2f} (all of one model's: {cost.states_wanted / 1e9:,.2f}), prompt KV "
            f"{cost.prompt_kv / 1e9:,.2f}"
            + (f", fitting {cost.fitted / 1e9:,.2f}" if cost.fitted else "")
            + (f"; {cost.disk / 1e9:,.2f} GB of files" if cost.disk else "")
        )
        if cost.reads:
            click.echo(f"             {_reads(cost.reads)}, at most")
    if preview.experts is not None:
        ranking = preview.experts
        click.echo(
            f"  experts    ranked in {_at(preview.experts_seconds)}; "
            f"{ranking.memory / 1e9:,.2f} GB of weights" + (f"; {_reads(ranking.reads)}" if ranking.reads else "")
        )
    if preview.fit is not None:
        click.echo(f"  {preview.fit}")
    planned, dense, fp8 = preview.planned_bytes, preview.dense_bytes, preview.dense_fp8_bytes
    if preview.missing is not None:
        click.echo(f"  {preview.missing}")
    if preview.stage_bytes is None or planned is None or dense is None or fp8 is None:
        click.echo("  sizes of weights and KV are known once the model has been fetched")
        return
    for stage, size in preview.stage_bytes.items():
        click.echo(f"  {stage:<10} {size / 1e6:,.1f} MB of weights")
    if preview.recipe.stages == "unified":
        click.echo("  one model for both stages: no KV travels")
        return
    click.echo(
        f"  KV of a request of {preview.prompt_tokens} tokens: {planned:,} bytes, dense {dense:,} "
        f"({dense / planned:.2f}x), dense from an fp8 pool {fp8:,} ({fp8 / planned:.2f}x)"
    )


def _cost(preview: Preview, name: str) -> str:
    """Time, memory and files of a step that is to do; empty where nothing is known of it."""
    cost = preview.left.get(name)
    if cost is None or preview.rates is None:
        return ""
    parts = [preview.rates.time(cost), f"{cost.peak.host / 1e9:,.2f} GB of memory"]
    parts += [f"{cost.peak.device / 1e9:,.2f} GB on devices"] if cost.peak.device else []
    parts += [f"{cost.disk / 1e9:,.2f} GB of files"] if cost.disk else []
    parts += [_reads(round(cost.reads))] if cost.reads else []
    return "  " + ", ".join(parts)


def _reads(size: int) -> str:
    """What is read from disk, and how long that takes at a speed that is assumed."""
    return f"reads {size / 1e9:,.0f} GB of weights from disk, {duration(size / 1e9)} at 1 GB/s"


def _at(seconds: float | None) -> str:
    """Of a part of a step."""
    return "a time that is not known here" if seconds is None else f"about {duration(seconds)} at this machine's speed"
