"""Run a part in processes of its own until its deadline, and read what they wrote, whatever they do."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from pdtrim_deploy.gpucheck.attempt import Attempt, attempt
from pdtrim_deploy.gpucheck.base import Part
from pdtrim_deploy.gpucheck.row import Row

HUNG_S = 90.0  # a check that runs so long and longer than its share of the part's time has failed
LEAST_S = 15.0  # with less time left no process is begun
NOT_BEGUN = "not begun: its part had ended before it"


def run_part(part: Part, python: Path, seconds: float, serve: Path | None = None) -> list[Row]:
    """A row of each check of a part, whatever it does.

    Where its process does not end as it should, the check that ran then has failed, and another process goes on with
    those after it. A check that began late and is stopped at the part's deadline is skipped.
    """
    end, names, rows = time.monotonic() + seconds, list[str](), list[Row]()
    with tempfile.TemporaryDirectory(prefix="pdtrim-gpu-check-", ignore_cleanup_errors=True) as folder:
        while True:
            done = attempt(part, python, Path(folder), end, rows, serve, HUNG_S)
            names, rows = list(done.names) or names, [*rows, *done.rows]
            if done.problem:
                broken = names[len(rows)] if len(rows) < len(names) else part.name
                rows.append(Row(broken, "failed", done.problem))
            rest = names[len(rows) :]
            if not rest:
                return rows
            if not done.names or end - time.monotonic() < LEAST_S:
                return [*rows, *_unfinished(part, done, rest, seconds)]


def _unfinished(part: Part, done: Attempt, rest: list[str], seconds: float) -> list[Row]:
    """Rows of checks that the part's time did not reach."""
    if done.stopped_after is None:
        return [Row(name, "skipped", NOT_BEGUN) for name in rest]
    problem = (
        f"its part's {seconds:.0f} s were over {done.stopped_after:.0f} s after it began; run it: "
        f"gpu-check --part {part.name}"
    )
    return [Row(rest[0], "skipped", problem), *(Row(name, "skipped", NOT_BEGUN) for name in rest[1:])]
