"""Run a part in a process of its own, until its end or its deadline, and read what it wrote; whatever it does."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path

from pdtrim_deploy.gpucheck.base import Part, parse
from pdtrim_deploy.gpucheck.row import Row

GRACE_S = 20.0  # for a part that must end the servers which it started
REASON = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*", re.MULTILINE)


def run_part(part: Part, python: Path, seconds: float, serve: Path | None = None) -> list[Row]:
    """The rows of a part; one more, `failed`, where it did not end as it should. Never raises for what a part does."""
    with tempfile.TemporaryDirectory(prefix="pdtrim-gpu-check-") as folder:
        file, log = Path(folder) / "rows", Path(folder) / "log"
        command = [
            str(python),
            "-m",
            f"{__package__}.child",
            part.function,
            str(file),
            *([str(serve)] if serve else []),
        ]
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
        rows, problem = _read(file)
        text = log.read_text(errors="replace")
    if late:
        problem = f"not done within {seconds:.0f} s"
    elif process.returncode < 0:
        problem = f"ended by {signal.Signals(-process.returncode).name}{_why(text)}"
    elif process.returncode > 0:
        problem = f"ended with exit code {process.returncode}{_why(text)}"
    elif not rows and not problem:
        problem = "ended without a row"
    return [*rows, *([Row(part.name, "failed", problem)] if problem else [])]


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


def _read(file: Path) -> tuple[list[Row], str]:
    """Rows up to the first line that is none, and what is wrong with it."""
    rows: list[Row] = []
    for number, text in enumerate(file.read_text(errors="replace").splitlines() if file.exists() else [], 1):
        try:
            rows.append(parse(text))
        except ValueError as error:
            return rows, f"line {number} of what it wrote cannot be read: {str(error)[:200]}"
    return rows, ""


def _why(log: str) -> str:
    """The last error that a log names."""
    reasons = REASON.findall(log)
    return f": {reasons[-1].strip()[:300]}" if reasons else ""
