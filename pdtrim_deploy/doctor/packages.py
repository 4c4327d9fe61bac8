"""Python packages of the environment we run in, by their metadata: nothing is imported."""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pdtrim_deploy.doctor.base import ALL, CheckContext, Finding, Job
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.serving.environment import REPO

OLDEST_PYTHON = (3, 11)
BUILDS: tuple[Job, ...] = ("build", "demo")


@dataclass(frozen=True)
class PythonVersion:
    """The interpreter."""

    jobs: tuple[Job, ...] = ALL

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """One line."""
        good = sys.version_info >= OLDEST_PYTHON
        yield Finding(
            group="machine",
            name="python",
            status="ok" if good else "wrong version",
            detail=platform.python_version(),
            mend=None if good else "install Python 3.11 or later and make the environment with it",
            needed_by=self.jobs,
        )


@dataclass(frozen=True)
class Package:
    """One package of an extra; `why` tells what an optional one is for, and `wanted_by` which recipes' builds stop
    without it. (One that a target alone wants is no such: the bundle is whole without its engine.)
    """

    name: str
    extra: str
    jobs: tuple[Job, ...] = ("build", "eval", "demo")
    why: str = ""
    wanted_by: Callable[[Recipe], bool] = lambda _: False

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """One line: its version against the clone's lock, else against the wheel's own pins."""
        required, mend = wanted_version(self.name, self.extra)
        has = installed(self.name)
        good = has is not None and required in (None, has.partition("+")[0])
        detail = f"{has or 'not installed'}{_cuda_of(self.name)}"
        if has and not good:
            detail += f", wanted {required}"
        yield Finding(
            group=self.extra,
            name=self.name,
            status="ok" if good else "wrong version" if has else "missing",
            detail=f"{detail} ({self.why})" if self.why else detail,
            mend=None if good else mend,
            # Another version than the lock's may well do: that is said, and does not hold the job back.
            needed_by=() if has and not good else self._needed_by(context.recipe),
        )

    def _needed_by(self, recipe: Recipe | None) -> tuple[Job, ...]:
        if not self.why:
            return self.jobs
        return BUILDS if recipe and self.wanted_by(recipe) else ()


def installed(name: str) -> str | None:
    """The version here, None when it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def wanted_version(name: str, extra: str, lock: Path = REPO / "constraints") -> tuple[str | None, str]:
    """The pinned version, where there is one, and the command that installs it."""
    file = lock / f"{extra if extra in ('serve', 'aiperf') else 'build'}.txt"
    if file.is_file():
        match = re.search(rf"^{re.escape(name)}==(\S+)$", file.read_text(), re.MULTILINE)
        if match:
            return match[1], "make setup"
    for line in metadata.requires("pdtrim-deploy") or ():
        if match := re.match(rf"{re.escape(name)}==([^\s;]+)", line):
            return match[1], f"pip install 'pdtrim-deploy[{extra}]'"
    return None, f"pip install 'pdtrim-deploy[{extra}]'"


def _cuda_of(name: str) -> str:
    """What torch was built for, read from its version.py."""
    spec = importlib.util.find_spec("torch") if name == "torch" else None
    if spec is None or spec.origin is None:
        return ""
    match = re.search(r"^cuda.*= '([\d.]+)'", (Path(spec.origin).parent / "version.py").read_text(), re.MULTILINE)
    return f", for CUDA {match[1]}" if match else ", for CPUs"
