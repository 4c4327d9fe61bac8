"""What a check finds: one line a thing, and the command that mends it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.recipe import Recipe

Job = Literal["build", "eval", "serve", "demo"]
Status = Literal["ok", "missing", "wrong version"]
ALL: tuple[Job, ...] = get_args(Job)


class Finding(BaseModel):
    """One line. `needed_by` names the jobs that cannot run without it: none when it is optional."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group: str
    name: str
    status: Status
    detail: str
    mend: str | None = None
    needed_by: tuple[Job, ...] = ()


@dataclass(frozen=True)
class CheckContext:
    """What the machine is looked at for.

    Attributes:
        recipe: its memory and disk are counted; None: only what there is.
        out: where the bundle goes.
        serve_python: as `ServeEnvironment.find` takes it.
        deep: load the plugin into SGLang for real.
        workers: Ray's on this machine that search, each with its own copy of the model; 0: this process does.

    """

    recipe: Recipe | None = None
    out: Path = field(default_factory=Path.cwd)
    cache: Cache = field(default_factory=Cache.default)
    serve_python: Path | None = None
    deep: bool = False
    workers: int = 0


class Check(Protocol):
    """Looks at one thing and imports nothing heavy. To add one: a class here beside the others, a line in `CHECKS`."""

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs it has something to say on."""
        ...

    def look(self, context: CheckContext) -> Iterable[Finding]:
        """Its lines."""


def first_failures(findings: Iterable[Finding], job: Job) -> list[Finding]:
    """What keeps `job` from running."""
    return [finding for finding in findings if finding.status != "ok" and job in finding.needed_by]


def gb(count: float) -> str:
    """1.5e9 -> `1.5 GB`."""
    return f"{count / 1e9:,.1f} GB"


def as_json(findings: Iterable[Finding], job: Job) -> dict[str, Any]:
    """What `doctor --json` prints."""
    findings = list(findings)
    return {
        "job": job,
        "can_run": not first_failures(findings, job),
        "findings": [finding.model_dump(mode="json") for finding in findings],
    }
