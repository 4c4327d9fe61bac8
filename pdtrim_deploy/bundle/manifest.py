"""The seal of a bundle: size and SHA-256 of its files, and the marker that it is complete.

`manifest.json` is written next to last and has size and SHA-256 of every file before it; `COMPLETE` is written last
and has the manifest's SHA-256. The manifest covers neither what later commands add to `reports/` (eval.json, ...) nor
the stages' model cards, into which `eval` writes the measured loss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pdtrim_deploy.bundle.engine import TargetResult
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.atomic import write_atomic
from pdtrim_deploy.local.cache import file_sha256
from pdtrim_deploy.plan import CHECKPOINTS

MANIFEST, COMPLETE, PLAN, RECIPE, REPORTS = "manifest.json", "COMPLETE", "plan.json", "recipe.yaml", "reports"
ENGINES = "engines"
CARD = "README.md"  # of a stage checkpoint
WORK = ".build"  # only while a build runs
UNSEALED = {MANIFEST, COMPLETE, *(f"{folder}/{CARD}" for folder in CHECKPOINTS)}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entry(_Frozen):
    """One sealed file; `size` in bytes."""

    size: int
    sha256: str


class Step(_Frozen):
    """One finished step of the build; `key` digests what its result depends on, `sizes` are its files' bytes."""

    key: str
    seconds: float
    sizes: dict[str, int]


class Manifest(_Frozen):
    """The seal. `files` by path relative to the bundle, `versions` by package, `engines` by their folder.

    `machine` is that of the build (`bundle.environment.machine`), empty in old bundles.
    `failures` has a sentence for each target of the recipe that could not be built; the rest is complete.
    """

    format: int = 1
    recipe_digest: str
    plan_digest: str
    seed: int
    versions: dict[str, str]
    machine: dict[str, Any] = {}
    steps: dict[str, Step]
    files: dict[str, Entry]
    engines: dict[str, TargetResult] = {}
    failures: dict[str, str] = {}


def read_seal(path: Path) -> Manifest | None:
    """The manifest whose digest COMPLETE has; None when the bundle was not finished.

    Raises:
        UserError: the two files disagree, or the manifest is of an unknown format.

    """
    try:
        sealed, text = (path / COMPLETE).read_bytes().strip(), (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.sha256(text).hexdigest().encode() != sealed:
        raise UserError(f"{path}: {MANIFEST} was changed after {COMPLETE} was written; build the bundle again")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError:
        raise UserError(f"{path}: {MANIFEST} is of another version; build the bundle again with --force") from None


def seal(path: Path, manifest: Manifest) -> None:
    """Write the manifest, then the marker, each atomically."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"
    write_atomic(path / MANIFEST, text)
    write_atomic(path / COMPLETE, hashlib.sha256(text.encode()).hexdigest() + "\n")


def entries(
    path: Path, reports: Collection[str] | None = None, note: Callable[[str], None] = lambda _: None
) -> dict[str, Entry]:
    """Size and SHA-256 of all files except the seal itself, the model cards, and reports not named in `reports`.

    `note` hears how far it is.
    """
    files = {str(file.relative_to(path)): file for file in walk(path)}
    sealed = {
        name: file
        for name, file in files.items()
        if name not in UNSEALED and (reports is None or name in reports or not name.startswith(f"{REPORTS}/"))
    }
    sizes, hashed, done = {name: file.stat().st_size for name, file in sealed.items()}, dict[str, Entry](), 0
    for name, file in sealed.items():
        note(hashing(done, sum(sizes.values())))
        hashed[name] = Entry(size=sizes[name], sha256=file_sha256(file))
        done += sizes[name]
    return hashed


def hashing(done: int, size: int) -> str:
    """How far it is, in bytes, for a reader."""
    digits = 0 if size >= 10**7 else 1
    return f"hashing: {done / 1e6:,.{digits}f} of {size / 1e6:,.{digits}f} MB"


def walk(path: Path) -> Iterator[Path]:
    """Files under `path` in order, without the build's work folder."""
    for file in sorted(path.rglob("*")):
        if not file.is_dir() and WORK not in file.relative_to(path).parts[:1]:
            yield file
