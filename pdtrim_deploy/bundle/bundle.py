"""A bundle: a folder with two stage models, their engines, one plan, a SHA-256 manifest and a completion marker.

    plan.json  recipe.yaml  prefill/  decode/  engines/TARGET/STAGE/  reports/  manifest.json  COMPLETE

and the file of key offsets, if the plan has any; both stages contain it too. A unified plan has one checkpoint, model/,
in the place of prefill/ and decode/, and no engines. `bundle.manifest` says how the two last are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pdtrim_deploy.bundle.engine import TargetResult
from pdtrim_deploy.bundle.manifest import (
    ENGINES,
    MANIFEST,
    PLAN,
    RECIPE,
    REPORTS,
    UNSEALED,
    Entry,
    Manifest,
    hashing,
    read_seal,
    walk,
)
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import file_sha256
from pdtrim_deploy.models.body import check_body
from pdtrim_deploy.plan import STAGES, PDPlan, Stage
from pdtrim_deploy.plan.blocks import BODY
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.targets import TARGETS


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
    def weight_folders(self) -> list[Path]:
        """All folders with weights: `checkpoints`, and that of prompts before a tail; UserError if this is missing."""
        check_body(self.prefill_dir, self.plan)
        return [*self.checkpoints, *([self.prefill_dir / BODY] if self.plan.kv_only_tail else [])]

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
        folders = [*plan.checkpoints]
        if plan.kv_only_tail and (path / (body := f"{plan.folder('prefill')}/{BODY}")).is_dir():  # else `check_body`
            folders.append(body)
        digests |= {f"{folder}/config.json": _plan_digest_in(path / folder) for folder in folders}
        for name, digest in digests.items():
            if digest != plan.digest:
                raise UserError(
                    f"{path}: {name} was made for plan {digest} but {PLAN} is {plan.digest}; build the bundle again"
                )
        return cls(path, plan, recipe, manifest)

    def verify(self, note: Callable[[str], None] = lambda _: None) -> list[str]:
        """Every difference between the folder and its seal, one sentence each; empty when there is none."""
        problems, hashed, size = [], 0, sum(entry.size for entry in self.manifest.files.values())
        present = {str(f.relative_to(self.path)): f for f in walk(self.path)}
        for name, entry in sorted(self.manifest.files.items()):
            file = present.pop(name, None)
            if file is None or not file.exists():  # a link to nothing
                problems.append(f"{name} is missing")
            elif file.stat().st_size != entry.size:
                problems.append(f"{name} has {file.stat().st_size} bytes, the manifest says {entry.size}")
            elif (digest := file_sha256(file)) != entry.sha256:
                problems.append(f"{name} has SHA-256 {digest}, the manifest says {entry.sha256}")
            hashed += entry.size
            note(hashing(hashed, size))
        extra = sorted(n for n in present if n not in UNSEALED and not n.startswith(f"{REPORTS}/"))
        return problems + [f"{name} is not in the manifest" for name in extra]


def engine_folder(target: str, stage: Stage) -> str:
    """Folder of an engine within a bundle, which is also its name in the manifest."""
    return f"{ENGINES}/{target}/{stage}"


def _plan_digest_in(stage_dir: Path) -> str:
    """Digest of the plan that a stage checkpoint carries in its config.json."""
    try:
        return PDPlan.parse(json.loads((stage_dir / "config.json").read_text())["pdtrim"], str(stage_dir)).digest
    except (FileNotFoundError, ValueError, RecursionError, KeyError, TypeError):
        raise UserError(f"{stage_dir}: its config.json carries no plan; build the bundle again") from None
