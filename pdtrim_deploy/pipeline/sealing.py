"""The end of a build: what no step of it made goes, but for what was measured on just these stages; then the seal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from pdtrim_deploy.bundle import (
    COMPLETE,
    ENGINES,
    MANIFEST,
    PLAN,
    RECIPE,
    REPORTS,
    Entry,
    Manifest,
    Step,
    entries,
    read_seal,
    seal,
)
from pdtrim_deploy.bundle.environment import machine, versions
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.atomic import write_atomic
from pdtrim_deploy.models.provenance import Provenance
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.pipeline import engines, heal, heal_kv
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.pipeline.fit_tokens import fit_sentence
from pdtrim_deploy.pipeline.model_card import refresh_cards, refresh_recoveries, write_cards
from pdtrim_deploy.plan import CHECKPOINTS
from pdtrim_deploy.recipe import Recipe

EVAL = "eval.json"
OF_STAGES = (EVAL, "tasks.json", "sizing.json")  # whatever engines there are; others may have been served by one


def is_sealed(out: Path, recipe: Recipe, steps: Mapping[str, Step]) -> bool:
    """Whether `out` is sealed for just this recipe and these steps."""
    try:
        manifest = read_seal(out)
    except UserError:
        return False
    return manifest is not None and manifest.recipe_digest == recipe.digest and manifest.steps == steps


def seal_bundle(context: Context, steps: dict[str, Step], failures: dict[str, str]) -> None:
    """Drop what is left of an earlier bundle, write the resolved recipe, the cards, the manifest, the marker."""
    recipe, out = context.recipe, context.out
    (out / COMPLETE).unlink(missing_ok=True)
    built = [name for name in steps if name.startswith(f"{ENGINES}/")]
    engines.keep_only(out, built)
    for folder in set(CHECKPOINTS) - context.plan.checkpoints.keys():
        if _was_built(out, folder):  # else it is the user's own
            shutil.rmtree(out / folder, ignore_errors=True)
    write_atomic(out / RECIPE, recipe.to_yaml())
    base = Provenance.read(context.checkpoint.path, recipe.model.source)
    short = fit_sentence(recipe, ModelSizes.of(context.checkpoint.config))
    write_cards(out, context.plan, recipe, base, heal_kv.healed(context), short, heal.left_out(context))
    files = entries(out, {name for step in steps.values() for name in step.sizes}, context.note)
    _drop_reports(out, files)
    _say_loss(out, context.plan.digest, recipe.quality)
    manifest = Manifest(
        recipe_digest=recipe.digest,
        plan_digest=context.plan.digest,
        seed=recipe.calibration.seed,
        versions=versions(),
        machine=machine(),
        steps=steps,
        files=files,
        engines={name: engines.read_engine(out / name) for name in built},
        failures=failures,
    )
    seal(out, manifest)


def _was_built(out: Path, folder: str) -> bool:
    """Whether a stage's folder is of an earlier build: the last seal has its step, or its config.json a plan."""
    before = _last_seal(out)
    if before is not None and folder in before.steps:
        return True
    try:
        config = json.loads((out / folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "pdtrim" in config


def _drop_reports(out: Path, files: Mapping[str, Entry]) -> None:
    """Remove reports that are not among `files`, unless they are of the same plan and weights, byte for byte.

    That is more than the plan's digest, which healed weights do not change. Folders are somebody's own.
    """
    last = _last_seal(out)
    before = last.files if last else {}
    for report in (out / REPORTS).glob("*"):
        name = f"{REPORTS}/{report.name}"
        if name in files or (report.is_dir() and not report.is_symlink()):
            continue
        on = (PLAN, *CHECKPOINTS, *([] if report.name in OF_STAGES else [ENGINES]))
        measured = {n: entry for n, entry in before.items() if n.partition("/")[0] in on}
        if not measured or name in before or not measured.items() <= files.items():
            report.unlink()


def _last_seal(out: Path) -> Manifest | None:
    """COMPLETE or not any more."""
    try:
        return Manifest.model_validate_json((out / MANIFEST).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _say_loss(out: Path, plan_digest: str, gates: Mapping[str, float]) -> None:
    """Cards that were written anew say what an eval.json that was kept does, and which gates are not measured."""
    refresh_recoveries(out, plan_digest, gates)
    file = out / REPORTS / EVAL
    if not file.is_file():
        return
    from pdtrim_deploy.evaluation.quality import Quality

    with suppress(ValidationError):  # of another version: as good as none
        refresh_cards(out, Quality.model_validate_json(file.read_bytes()))
