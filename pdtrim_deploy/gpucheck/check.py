"""The whole check: every part that the machine allows, one after another, and what is written of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pdtrim_deploy import __version__
from pdtrim_deploy.gpucheck.attempt import GRACE_S
from pdtrim_deploy.gpucheck.base import Part
from pdtrim_deploy.gpucheck.machine import Environment, choose, driver
from pdtrim_deploy.gpucheck.row import Row
from pdtrim_deploy.gpucheck.supervise import LEAST_S, run_part

BUDGET_S = 600.0
NO_DEVICE = "no CUDA device: neither this Python's torch nor that of SGLang sees one"
STOPPED = "not begun: the check was stopped before it"


@dataclass(frozen=True)
class Outcome:
    """Rows of all parts, and the machine that made them."""

    environments: Sequence[Environment]
    rows: Sequence[Row]
    driver: str

    @property
    def device(self) -> Mapping[str, str | int]:
        """The first device that any Python sees; empty without one."""
        return next((environment.device for environment in self.environments if environment.device), {})

    @property
    def failed(self) -> bool:
        """Whether any part failed."""
        return any(row.status == "failed" for row in self.rows)

    def to_json(self, command: str) -> dict[str, Any]:
        """Contents of gpu-check.json; versions of the Python that sees the device come first."""
        seeing = sorted(self.environments, key=lambda environment: not environment.device)
        versions = {name: text for environment in reversed(seeing) for name, text in environment.versions.items()}
        return {
            "command": command,
            "device": dict(self.device),
            "driver": self.driver,
            "versions": {"pdtrim-deploy": __version__} | versions,
            "rows": [asdict(row) for row in self.rows],
        }


def check(
    parts: Sequence[Part],
    here: Environment,
    serve: Environment | None,
    *,
    end: float,
    done: Callable[[Outcome], None] = lambda outcome: None,
    say: Callable[[str], None] = lambda sentence: None,
) -> Outcome:
    """Run `parts` until `end` on the monotonic clock.

    `done` is called before the first and after each, with rows of all: of those to come that they were not begun.
    """
    environments, version = [environment for environment in (here, serve) if environment is not None], driver()

    def outcome(rows: Sequence[Row], later: Sequence[Part]) -> Outcome:
        return Outcome(environments, [*rows, *(Row(part.name, "skipped", STOPPED) for part in later)], version)

    rows: list[Row] = []
    seen = outcome(rows, parts)
    for place, part in enumerate(parts):
        done(seen)
        say(f"{part.name} ...")
        kept = sum(later.seconds for later in parts[place + 1 :] if not (later.extra or _why_not(later, here, serve)))
        new = (
            _rows(part, here, serve, end, kept) if seen.device else [Row(part.name, "skipped", _no_device(here, serve))]
        )
        for row in new:
            say("  ".join(filter(None, (row.status, row.part, row.reason, _words(row.figure)))))
        rows += new
        seen = outcome(rows, parts[place + 1 :])
    done(seen)
    return seen


def write(outcome: Outcome, command: str, file: Path) -> None:
    """Replace `file` at once."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(json.dumps(outcome.to_json(command), indent=1, allow_nan=False) + "\n")
    os.replace(new, file)


def _why_not(part: Part, here: Environment, serve: Environment | None) -> str:
    """Why this machine cannot run a part; empty when it can."""
    module = part.function.partition(":")[0]
    if find_spec(module.partition(".")[0]) is None or find_spec(module) is None:
        return f"this version has no {module}"
    return choose(part, here, serve)[1]


def _no_device(here: Environment, serve: Environment | None) -> str:
    """A Python that could not say what it has may have had the device."""
    problems = [environment.problem for environment in (here, serve) if environment is not None and environment.problem]
    return "; ".join([NO_DEVICE, *problems])


def _rows(part: Part, here: Environment, serve: Environment | None, end: float, kept: float) -> Sequence[Row]:
    """`kept` seconds of what is left belong to parts that follow, unless this one would get less than its own.

    What a part that is stopped needs for its servers' end is left of the whole time.
    """
    why = _why_not(part, here, serve)
    environment, _ = choose(part, here, serve)
    if why or environment is None:
        return [Row(part.name, "skipped", why)]
    left = end - GRACE_S - time.monotonic()
    if left < LEAST_S:
        return [Row(part.name, "skipped", f"no time was left; run it alone: gpu-check --part {part.name}")]
    served = serve.python if serve is not None and part.serves else None
    try:
        return run_part(part, environment.python, min(left, max(part.seconds, left - kept)), served)
    except OSError as error:  # no temporary folder, no space left, no such program
        return [Row(part.name, "failed", f"no process of it could be run: {error}")]


def _words(figure: Mapping[str, float | int | str] | None) -> str:
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in (figure or {}).items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())
