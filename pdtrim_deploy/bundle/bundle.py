"""A bundle: a folder with two stage models, their engines, one plan, a SHA-256 manifest and a completion marker.

    plan.json  recipe.yaml  prefill/  decode/  engines/TARGET/STAGE/  reports/  manifest.json  COMPLETE

and the file of key offsets, if the plan has any; both stages contain it too. A unified plan has one checkpoint, model/,
in the place of prefill/ and decode/, and no engines.

`manifest.json` is written next to last and has size and SHA-256 of every file before it; `COMPLETE` is written last
and has the manifest's SHA-256. The manifest covers neither what later commands add to `reports/` (eval.json, ...) nor
the stages' model cards, into which `eval` writes the measured loss.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pdtrim_deploy.bundle.engine import TargetResult
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import file_sha256
from pdtrim_deploy.plan import STAGES, UNIFIED, PDPlan, Stage
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.targets import TARGETS

MANIFEST, COMPLETE, PLAN, RECIPE, REPORTS = "manifest.json", "COMPLETE", "plan.json", "recipe.yaml", "reports"
ENGINES = "engines"
CARD = "README.md"  # of a stage checkpoint
WORK = ".build"  # only while a build runs
UNSEALED = {MANIFEST, COMPLETE, *(f"{folder}/{CARD}" for folder in (*STAGES, UNIFIED))}


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


@dataclass(frozen=True)
class Bundle:
    """A complete bundle whose parts name the same plan; `verify` re-reads every byte."""

    path: Path
    plan: PDPlan
    recipe: Recipe
    manifest: Manifest

    @property
    def prefill_dir(self) -> Path:
        """HF checkpoint of the prefill stage."""
        return self.stage_dir("prefill")

    @property
    def decode_dir(self) -> Path:
        """HF checkpoint of the decode stage."""
        return self.stage_dir("decode")

    @property
    def reports_dir(self) -> Path:
        """JSON about how the bundle was made and what was measured on it."""
        return self.path / REPORTS

    def stage_dir(self, stage: Stage) -> Path:
        """HF checkpoint of `stage`; of a unified plan the same for both."""
        return self.path / self.plan.folder(stage)

    @property
    def checkpoints(self) -> list[Path]:
        """All HF checkpoints, prefill first."""
        return [self.path / folder for folder in self.plan.checkpoints]

    @property
    def engines(self) -> dict[str, TargetResult]:
        """Its engines by folder, targets in the recipe's order, prefill before decode."""
        order = [engine_folder(target, stage) for target in TARGETS for stage in STAGES]
        return {name: self.manifest.engines[name] for name in order if name in self.manifest.engines}

    def engine_dir(self, target: str, stage: Stage) -> Path:
        """Folder of the engine of `stage` for `target`.

        Raises:
            UserError: the bundle has no such engine, or only its description; names the engines that it has.

        """
        folder = engine_folder(target, stage)
        entry = self.manifest.engines.get(folder)
        if entry is not None and entry.status == "built":
            return self.path / folder
        reason = self.manifest.failures.get(target)
        if reason:
            raise UserError(f"{self.path}: its {stage} engine could not be built ({reason}); fix that and build again")
        has = dict.fromkeys(engine.target for engine in self.engines.values() if engine.status == "built")
        raise UserError(
            f"{self.path}: no {stage} engine for target {target}, the targets built are {', '.join(has) or 'none'}; "
            f"add `{target}:` under `targets:` of the recipe and build again"
        )

    def engine_files(self, folder: str) -> dict[str, Entry]:
        """Size and SHA-256 of an engine's files, by path within its folder."""
        start = folder + "/"
        return {n.removeprefix(start): entry for n, entry in self.manifest.files.items() if n.startswith(start)}

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """The bundle at `path`; checks that it is complete and that all parts have one plan.

        Raises:
            UserError: absent, incomplete, a damaged seal, or parts with different plans.

        """
        if not path.is_dir():
            raise UserError(f"{path}: no such bundle; make it with: pdtrim-deploy build RECIPE --out {path}")
        manifest = read_seal(path)
        if manifest is None:
            raise UserError(f"{path}: not a complete bundle; finish it with: pdtrim-deploy build RECIPE --out {path}")
        plan, recipe = PDPlan.load(path / PLAN), Recipe.load(path / RECIPE)
        digests = {MANIFEST: manifest.plan_digest}
        digests |= {f"{folder}/config.json": _plan_digest_in(path / folder) for folder in plan.checkpoints}
        for name, digest in digests.items():
            if digest != plan.digest:
                raise UserError(
                    f"{path}: {name} was made for plan {digest} but {PLAN} is {plan.digest}; build the bundle again"
                )
        return cls(path, plan, recipe, manifest)

    def verify(self) -> list[str]:
        """Every difference between the folder and its seal, one sentence each; empty when there is none."""
        problems = []
        present = {str(f.relative_to(self.path)): f for f in walk(self.path)}
        for name, entry in sorted(self.manifest.files.items()):
            file = present.pop(name, None)
            if file is None:
                problems.append(f"{name} is missing")
            elif file.stat().st_size != entry.size:
                problems.append(f"{name} has {file.stat().st_size} bytes, the manifest says {entry.size}")
            elif (digest := file_sha256(file)) != entry.sha256:
                problems.append(f"{name} has SHA-256 {digest}, the manifest says {entry.sha256}")
        extra = sorted(n for n in present if n not in UNSEALED and not n.startswith(f"{REPORTS}/"))
        return problems + [f"{name} is not in the manifest" for name in extra]


def engine_folder(target: str, stage: Stage) -> str:
    """Folder of an engine within a bundle, which is also its name in the manifest."""
    return f"{ENGINES}/{target}/{stage}"


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
    hashed: dict[str, Entry] = {}
    for number, (name, file) in enumerate(sealed.items(), 1):
        note(f"hashing {name}: {number}/{len(sealed)} files")
        hashed[name] = Entry(size=file.stat().st_size, sha256=file_sha256(file))
    return hashed


def walk(path: Path) -> Iterator[Path]:
    """Files under `path` in order, without the build's work folder."""
    for file in sorted(path.rglob("*")):
        if not file.is_dir() and WORK not in file.relative_to(path).parts[:1]:
            yield file


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace `path` by text or bytes: readers see the old or the new file, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _plan_digest_in(stage_dir: Path) -> str:
    """Digest of the plan that a stage checkpoint carries in its config.json."""
    try:
        return PDPlan.parse(json.loads((stage_dir / "config.json").read_text())["pdtrim"], str(stage_dir)).digest
    except (FileNotFoundError, ValueError, RecursionError, KeyError, TypeError):
        raise UserError(f"{stage_dir}: its config.json carries no plan; build the bundle again") from None
