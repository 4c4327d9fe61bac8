"""One process of a part: started, stopped where it hangs or its time is over, and what it wrote read."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtrim_deploy.gpucheck.base import DEVICE_LOST, Part, parse, parse_names
from pdtrim_deploy.gpucheck.row import Row
from pdtrim_deploy.local.child import Child
from pdtrim_deploy.local.job import dies_with

GRACE_S = 20.0  # for a part that must end the servers which it started
POLL_S = 0.2
LOG_BYTES = 1 << 18  # of the log's end
REASON = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*", re.MULTILINE)


@dataclass(frozen=True)
class Attempt:
    """What a process of a part did.

    Attributes:
        names: of all the part's checks; empty where it did not come to list them.
        rows: of the checks that it ran.
        problem: what is wrong with the check after these; empty where nothing is.
        stopped_after: seconds that a check had run when the part's time was over; None where it was not.

    """

    names: Sequence[str]
    rows: Sequence[Row]
    problem: str = ""
    stopped_after: float | None = None


def attempt(
    part: Part, python: Path, folder: Path, end: float, before: Sequence[Row], serve: Path | None, hung_s: float
) -> Attempt:
    """Run the checks that follow those with a row, until `end` on the monotonic clock.

    A check that runs for `hung_s` and for longer than its share of the time has failed.
    """
    here = Path(tempfile.mkdtemp(dir=folder))
    file, log, built = (here / name for name in ("rows", "log", "built"))
    built.mkdir()
    left = end - time.monotonic()
    command = [str(python), "-m", f"{__package__}.child", part.function, str(file), str(left), str(len(before))]
    command += [str(serve), str(built)] if serve else []
    with log.open("wb") as output:
        process = Child(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=dies_with(os.getpid()),
        )
        try:
            late, ran = _wait(process, file, end, len(before), hung_s)
        finally:
            _kill(process)
    names, rows, problem = _read(file, len(before))
    if late and (ran >= hung_s or not names):
        return Attempt(names, rows, f"not done within {ran:.0f} s")
    if late:
        return Attempt(names, rows, stopped_after=ran)
    ending = _ending(process.returncode, len(rows), len(names) - len(before), log)
    return Attempt(names, rows, (ending or problem) if process.returncode else (problem or ending))


def _ending(code: int, rows: int, checks: int, log: Path) -> str:
    """What is wrong with how a process ended that has written `rows` for its `checks`; empty: nothing."""
    if code < 0:
        memory = ", most likely for memory" if -code == signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{memory}{_why(log)}"
    if code == DEVICE_LOST and rows:
        return ""
    if code > 0:
        return f"ended with exit code {code}{_why(log)}"
    if not rows:
        return "ended without a row"
    return "ended with exit code 0 before this check was done" if rows < checks else ""


def _wait(process: Child[Any], file: Path, end: float, before: int, hung_s: float) -> tuple[bool, float]:
    """Whether it had to be stopped, and how long the check had run that it was in."""
    began, lines = time.monotonic(), 0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.01, min(POLL_S, end - time.monotonic())))
            return False, 0.0
        now = time.monotonic()
        written = file.read_bytes().splitlines() if file.exists() else []
        if len(written) != lines:
            began, lines = now, len(written)
        if now >= end or (lines and now - began >= max(hung_s, _share(written, before, end - began))):
            break
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    return True, now - began


def _share(written: Sequence[bytes], before: int, left: float) -> float:
    """Seconds of what is left for each check that has no row yet."""
    try:
        names = parse_names(written[0].decode(errors="replace"))
    except ValueError:
        return 0.0
    return left / max(1, len(names) - before - len(written) + 1)


def _kill(process: Child[Any]) -> None:
    """What is left of its process group; servers in groups of their own die with the process that started them."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(file: Path, before: int) -> tuple[list[str], list[Row], str]:
    """Names of checks, rows up to the first line that is not the next check's, and what is wrong with that line."""
    names: list[str] = []
    rows: list[Row] = []
    for number, text in enumerate(file.read_text(errors="replace").splitlines() if file.exists() else [], 1):
        try:
            if number == 1:
                names = parse_names(text)
                continue
            row, place = parse(text), before + len(rows)
            if place >= len(names) or row.part != names[place]:
                raise ValueError(f"a row of {row.part}, which is not the next check")
            rows.append(row)
        except ValueError as error:
            return names, rows, f"line {number} of what it wrote cannot be read: {str(error)[:200]}"
    return names, rows, ""


def _why(log: Path) -> str:
    """The last error that a log's end names."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        reasons = REASON.findall(file.read().decode(errors="replace"))
    return f": {reasons[-1].strip()[:300]}" if reasons else ""
