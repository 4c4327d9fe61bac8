"""A job in a process of its own: its answer, time, peak memory, or how it died."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.child import Child

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Finished:
    """`answer` of the process; `peak_memory` in bytes, `seconds` of wall time."""

    answer: dict[str, Any]
    seconds: float
    peak_memory: int


def run_job(
    command: Sequence[str],
    job: Mapping[str, Any],
    scratch: Path,
    environment: Mapping[str, str],
    note: Callable[[str], None] = lambda _: None,
) -> Finished:
    """Write the job to a file, run `command` + that file, read its answer (`job.answer` is set here).

    Meanwhile `note` hears the lines that it appends to `job.notes`. The process dies with the thread that calls this.
    Raises UserError: the answer has `error`, or the process was killed or died without an answer.
    """
    answer, log, notes = scratch / "answer.json", scratch / "build.log", scratch / "notes.log"
    (scratch / "job.json").write_text(json.dumps({**job, "answer": str(answer), "notes": str(notes)}))
    started = time.monotonic()
    with log.open("wb") as output:
        process = Child(
            [*command, str(scratch / "job.json")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            preexec_fn=dies_with(os.getpid()),
        )
        try:
            memory = _wait(process, notes, note)
        except BaseException:
            process.kill()
            process.wait()
            raise
    code, seconds = process.returncode, time.monotonic() - started
    last = last_line(log.read_text(errors="replace"))
    spent = f"after {seconds:.0f} s with {memory / 1e9:.1f} GB in use"
    if code == -signal.SIGKILL:
        raise UserError(f"the build process was killed {spent}, most likely for memory; use a machine with more memory")
    if code < 0:
        raise UserError(f"the build process died of {signal.Signals(-code).name} {spent}: {last}")
    if not answer.exists():
        raise UserError(f"the build process ended with code {code} {spent}: {last}")
    result = json.loads(answer.read_text())
    if "error" in result:
        raise UserError(result["error"])
    return Finished(result, round(seconds, 2), memory)


def _wait(process: Child[Any], notes: Path, note: Callable[[str], None]) -> int:
    """Wait for the end; return the peak memory. wait4's ru_maxrss would include the parent's memory before exec."""
    most, noted, running = 0, 0, True
    while running:
        running = process.poll() is None
        most = max(most, most_memory(process.pid) if running else 0)
        *lines, _ = notes.read_text().split("\n") if notes.exists() else [""]  # behind the last is half a line
        for line in lines[noted:]:
            note(line)
        noted = len(lines)
        time.sleep(0.05)
    return most


def dies_with(parent: int) -> Callable[[], None]:
    """For the child: the kernel kills it when the thread that started it ends."""
    prctl = ctypes.CDLL(None).prctl  # loaded before the fork: dlopen after it may deadlock

    def apply() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return apply


def most_memory(process: int | str = "self") -> int:
    """Peak memory of a process in bytes (VmHWM); 0 if the system does not report it, or it has ended."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text()
        return max([0, *(int(line.split()[1]) * 1024 for line in status.splitlines() if line[:6] == "VmHWM:")])
    return 0


def last_line(printed: str) -> str:
    """The last line of a program's output that is not empty: most often what was wrong."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
