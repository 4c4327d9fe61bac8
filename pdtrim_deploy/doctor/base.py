"""The result of a check: one finding per thing, with the command that fixes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import ON_CPU, Compute
from pdtrim_deploy.recipe import Recipe

Job = Literal["build", "eval", "serve", "demo"]
Status = Literal["ok", "missing", "wrong version"]
ALL: tuple[Job, ...] = get_args(Job)


class Finding(BaseModel):
    """One line of the report. `needed_by` names the jobs that cannot run without it; empty when it is optional."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group: str
    name: str
    status: Status
    detail: str
    mend: str | None = None
    needed_by: tuple[Job, ...] = ()


@dataclass(frozen=True)
class CheckContext:
    """What the checks need to know.

    Attributes:
        recipe: its needs of memory and disk are checked; None: only what the machine has is reported.
        out: folder of the bundle.
        serve_python: as `ServeEnvironment.find` takes it.
        deep: load the plugin into SGLang for real.
        workers: Ray workers on this machine that search, each with its own copy of the model; 0: this process.
        compute: where the job computes, and in how much memory.
        judged_in: dtype that the job judges in, where the command chose it; None: the recipe's.
        priced: say what each step of the build takes; a second or two, for how fast the device is.

    """

    recipe: Recipe | None = None
    out: Path = field(default_factory=Path.cwd)
    cache: Cache = field(default_factory=Cache.default)
    serve_python: Path | None = None
    deep: bool = False
    workers: int = 0
    compute: Compute = ON_CPU
    judged_in: str | None = None
    priced: bool = False


class Check(Protocol):
    """Checks one thing and imports nothing heavy. To add one, write a class and list it in `CHECKS`."""

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs that it concerns."""
        ...

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """The findings."""


def first_failures(findings: Iterable[Finding], job: Job) -> list[Finding]:
    """The findings that keep `job` from running."""
    return [finding for finding in findings if finding.status != "ok" and job in finding.needed_by]


def as_json(findings: Iterable[Finding], job: Job) -> dict[str, Any]:
    """The output of `doctor --json`."""
    findings = list(findings)
    return {
        "job": job,
        "can_run": not first_failures(findings, job),
        "findings": [finding.model_dump(mode="json") for finding in findings],
    }
