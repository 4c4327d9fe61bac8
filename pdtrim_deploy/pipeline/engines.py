"""Engines of both stages for the recipe's targets: each is built in a process of its own by `pdtrim_builders`.

So a build that dies takes nothing with it, and the core imports no builder. A target that fails is left out, with one
sentence in the manifest; the others are built all the same.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from pdtrim_deploy.bundle import ENGINES, WORK, engine_folder
from pdtrim_deploy.bundle.engine import RESULT, TargetResult
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import file_sha256
from pdtrim_deploy.local.job import run_job
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.recipe.targets import Target

BUILDER = (sys.executable, "-P", "-m", "pdtrim_builders")  # -P: no module of the folder we were started in


def build_engine(context: Context, target: str, stage: Stage, section: Target) -> set[str]:
    """Build one engine into its folder of the bundle.

    Raises:
        UserError: one sentence that names the target.

    """
    folder = context.out / engine_folder(target, stage)
    options = section.model_dump(mode="json", exclude_none=True)
    job = {
        "target": target,
        "stage_dir": str((context.out / stage).absolute()),
        "out_dir": str(folder.absolute()),
        "options": options,
    }
    try:
        if section.calibrates:
            options["prompts"] = _calibration_texts(context)
        context.note(f"building for {target}")
        with tempfile.TemporaryDirectory(dir=context.out / WORK) as scratch:
            done = run_job(BUILDER, job, Path(scratch), os.environ, lambda line: context.note(f"{target}: {line}"))
    except UserError as error:  # there is no such text, or the process died
        raise UserError(f"target {target}: {stage}: {error}") from None
    if refused := done.answer.get("refused"):
        raise UserError(refused)
    context.note(summary(read_engine(folder)))
    return {engine_folder(target, stage)}


def depends_on(section: Target, calibration: object) -> list[object]:
    """What an engine depends on besides its stage checkpoint, for a step's key."""
    file = file_sha256(section.reads) if section.reads and section.reads.is_file() else None
    return [section.model_dump(mode="json"), file, calibration if section.calibrates else None]


def read_engine(folder: Path) -> TargetResult:
    """What the builder said of the engine in `folder`."""
    return TargetResult.model_validate_json((folder / RESULT).read_bytes())


def summary(engine: TargetResult) -> str:
    """One line on how an engine was built."""
    parts = [f"{engine.size / 1e6:,.1f} MB", f"{engine.seconds:.1f} s"]
    if engine.peak_memory:
        parts.append(f"{engine.peak_memory / 1e9:.2f} GB of memory")
    if engine.numerics:
        parts.append(f"error {engine.numerics.hidden_error:.1e} of {engine.numerics.tolerance:.0e} allowed")
    return f"{engine.target} {engine.stage}: {engine.state}, {', '.join(parts)}"


def keep_only(out: Path, kept: Collection[str]) -> None:
    """Remove every engine folder that is not one of `kept`, such as those of earlier recipes and of failed targets."""
    for folder in [*(out / ENGINES).glob("*/*"), *(out / ENGINES).glob("*"), out / ENGINES]:
        name = str(folder.relative_to(out))
        if folder.is_dir() and not any(keep == name or keep.startswith(f"{name}/") for keep in kept):
            shutil.rmtree(folder)


def _calibration_texts(context: Context) -> list[str]:
    """The calibration sequences as text: the builder has the stage's tokenizer, and no corpora."""
    from pdtrim_deploy.models.loading import load_tokenizer

    section, tokenizer = context.recipe.calibration, load_tokenizer(context.checkpoint.path)
    rows = context.calibration(section.sequences, section.length)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
