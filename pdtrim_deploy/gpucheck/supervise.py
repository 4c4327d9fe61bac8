"""Run a part in a process of its own, until its end or its deadline, and read what it wrote; whatever it does."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from pdtrim_deploy.gpucheck.base import Part, parse, parse_names
from pdtrim_deploy.gpucheck.row import Row

GRACE_S = 20.0  # for a part that must end the servers which it started
HUNG_S = 90.0  # a check that ran so long when its part's time was over has failed; a shorter one came too late
NOT_BEGUN = "not begun: its part had ended before it"
REASON = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*", re.MULTILINE)


def run_part(part: Part, python: Path, seconds: float, serve: Path | None = None) -> list[Row]:
    """A row of each check of a part, whatever it does.

    Where it does not end as it should, the check that ran then has failed, and those after it are skipped. A check that
    began late and is stopped at the part's deadline is skipped too.
    """
    with tempfile.TemporaryDirectory(prefix="pdtrim-gpu-check-") as folder:
        file, log, built = (Path(folder) / name for name in ("rows", "log", "built"))
        built.mkdir()
        command = [str(python), "-m", f"{__package__}.child", part.function, str(file), str(seconds)]
        command += [str(serve), str(built)] if serve else []
        began = time.time()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                late = _wait(process, seconds)
            finally:
                _kill(process)
        names, rows, problem = _read(file)
        ran = began + seconds - (file.stat().st_mtime if rows else began)  # the check that was stopped
        text = log.read_text(errors="replace")
    if late:
        problem = f"not done within {seconds:.0f} s of its part"
    elif process.returncode < 0:
        problem = f"ended by {signal.Signals(-process.returncode).name}{_why(text)}"
    elif process.returncode > 0:
        problem = f"ended with exit code {process.returncode}{_why(text)}"
    elif not rows and not problem:
        problem = "ended without a row"
    if not problem:
        return rows
    broken, *rest = names[len(rows) :] or [part.name]
    if late and names and ran < HUNG_S:
        problem = (
            f"its part's {seconds:.0f} s were over {ran:.0f} s after it began; run it: gpu-check --part {part.name}"
        )
        return [*rows, *(Row(name, "skipped", problem if name == broken else NOT_BEGUN) for name in (broken, *rest))]
    return [*rows, Row(broken, "failed", problem), *(Row(name, "skipped", NOT_BEGUN) for name in rest)]


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether it had to be stopped."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        return True


def _kill(process: subprocess.Popen[bytes]) -> None:
    """What is left of its process group; servers in groups of their own die with the process that started them."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(file: Path) -> tuple[list[str], list[Row], str]:
    """Names of checks, rows up to the first line that is none, and what is wrong with that line."""
    names: list[str] = []
    rows: list[Row] = []
    for number, text in enumerate(file.read_text(errors="replace").splitlines() if file.exists() else [], 1):
        try:
            if number == 1:
                names = parse_names(text)
            else:
                rows.append(parse(text))
        except ValueError as error:
            return names, rows, f"line {number} of what it wrote cannot be read: {str(error)[:200]}"
    return names, rows, ""


def _why(log: str) -> str:
    """The last error that a log names."""
    reasons = REASON.findall(log)
    return f": {reasons[-1].strip()[:300]}" if reasons else ""
