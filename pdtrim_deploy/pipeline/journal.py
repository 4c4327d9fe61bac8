"""Which steps of a build are done. Kept beside the bundle while it is built, in its manifest afterwards."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pdtrim_deploy.bundle import COMPLETE, ENGINES, MANIFEST, REPORTS, WORK, Step, read_seal
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.row_log import RowLog

STEPS = "steps.jsonl"


def chained_key(before: str, depends_on: Any) -> str:
    """SHA-256 over the key of the step before and what this step itself depends on (JSON)."""
    return hashlib.sha256(f"{before}\n{json.dumps(depends_on, sort_keys=True)}".encode()).hexdigest()


class Journal:
    """Finished steps of the bundle at `out`. A step counts only while its files have the sizes it left them with.

    Kill -9 at any moment: files appear whole or not at all, and a step is written down after its files; before a
    step is made again it is struck out, and so is COMPLETE.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._log = RowLog(out / WORK / STEPS, "steps")
        self.steps = self._replayed() if self._log.exists else self._sealed()

    def _replayed(self) -> dict[str, Step]:
        """A later row of a step replaces the earlier one; a row without a key strikes the step out."""
        newest = {row["step"]: row for row in self._log.rows}
        return {
            name: Step.model_validate({key: value for key, value in row.items() if key != "step"})
            for name, row in newest.items()
            if "key" in row
        }

    def _sealed(self) -> dict[str, Step]:
        try:
            manifest = read_seal(self.out)
        except UserError:  # a damaged seal vouches for nothing
            manifest = None
        return dict(manifest.steps) if manifest else {}

    def done(self, name: str, key: str) -> bool:
        """Whether this very step was finished and its files still stand."""
        step = self.steps.get(name)
        return step is not None and step.key == key and step.sizes == _sizes(self.out, list(step.sizes))

    def keep_only(self, names: Collection[str]) -> None:
        """Strike out all other steps: of an earlier recipe, or to be made again."""
        for name in self.steps.keys() - set(names):
            self._strike(name)

    @contextmanager
    def making(self, name: str, key: str, outputs: Sequence[str]) -> Iterator[None]:
        """Strike the step out, let the block make its `outputs` (files or folders), write the step down."""
        self._strike(name)
        (self.out / COMPLETE).unlink(missing_ok=True)
        started = time.perf_counter()
        yield
        files = [str(f.relative_to(self.out)) for output in outputs for f in _files(self.out / output)]
        seconds = round(time.perf_counter() - started, 3)
        self.steps[name] = Step(key=key, seconds=seconds, sizes=_sizes(self.out, files))
        self._write({"step": name} | self.steps[name].model_dump())

    def forget(self) -> None:
        """Strike out every step."""
        self.steps = {}
        self._log.restart()

    def _strike(self, name: str) -> None:
        self.steps.pop(name, None)
        self._write({"step": name})

    def _write(self, row: dict[str, Any]) -> None:
        """After the steps that the seal names, where the log is new."""
        known = {name: step for name, step in self.steps.items() if name != row["step"]}
        sealed = [] if self._log.exists else [{"step": name} | step.model_dump() for name, step in known.items()]
        self._log.append(*sealed, row)


def refuse_strangers(out: Path) -> None:
    """UserError where `out` is there and is neither empty nor a bundle, whole, begun or damaged.

    Others have a `.build` or a manifest.json too: what stands in them tells.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder; choose another --out")
    work = out / WORK
    held = {path.name for path in out.iterdir()} if out.exists() else set()
    # Killed before it wrote a step down, a build leaves nothing but its work folder.
    begun = (work / STEPS).is_file() or (held == {WORK} and work.is_dir() and not any(work.iterdir()))
    if held and not (begun or _was_sealed(out)):
        raise UserError(f"{out} holds other files and is no bundle; choose another --out")


def _was_sealed(out: Path) -> bool:
    """Whether one of the two files that seal a bundle is ours."""
    try:
        if re.fullmatch(rb"[0-9a-f]{64}\n", (out / COMPLETE).read_bytes()):
            return True
    except OSError:
        pass
    try:
        manifest = json.loads((out / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and "plan_digest" in manifest


@contextmanager
def claim(out: Path, force: bool) -> Iterator[None]:
    """Hold `out` for one build: made if absent, refused when it holds something else or another build runs there.

    With `force` no step counts as done. The work folder goes when the block ends well.
    """
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another build is running there; wait for it or choose another --out") from None
        refuse_strangers(out)
        # Scratch of a build that was killed: the lock is ours.
        killed = (".*.*-*", "*/.*.*-*", f"{ENGINES}/*/.*.*-*", f"{WORK}/*/")
        for stale in (path for pattern in killed for path in out.glob(pattern)):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        if force:
            Journal(out).forget()
            for name in ("search-*.jsonl", "judged.jsonl"):  # else the search would go on from its end
                for file in (out / REPORTS).glob(name):
                    file.unlink()
        (out / WORK).mkdir(exist_ok=True)
        yield
        shutil.rmtree(out / WORK)
    finally:
        os.close(handle)


def _files(path: Path) -> list[Path]:
    return sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]


def _sizes(out: Path, names: list[str]) -> dict[str, int]:
    return {name: (out / name).stat().st_size for name in names if (out / name).is_file()}
