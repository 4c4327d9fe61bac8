"""A build step in a fresh process: what it answers, how long it took, how much memory, and how it died."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdtrim_deploy.errors import UserError


@dataclass(frozen=True)
class Finished:
    """`answer` of the process; `peak_memory` in bytes, `seconds` of wall time."""

    answer: dict[str, Any]
    seconds: float
    peak_memory: int


def run_job(command: Sequence[str], job: Mapping[str, Any], scratch: Path, environment: Mapping[str, str]) -> Finished:
    """Write the job to a file, run `command` + that file, read its answer (`job.answer` is set here).

    Raises UserError: the process said `error`, was killed, or died without an answer.
    """
    answer, log = scratch / "answer.json", scratch / "build.log"
    (scratch / "job.json").write_text(json.dumps({**job, "answer": str(answer)}))
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen([*command, str(scratch / "job.json")], stdout=output, stderr=output, env=environment)
        try:
            memory = _wait(process)
        except BaseException:
            process.kill()
            process.wait()
            raise
    code, seconds = process.returncode, time.monotonic() - started
    spent = f"after {seconds:.0f} s with {memory / 1e9:.1f} GB in use"
    if code == -signal.SIGKILL:
        raise UserError(f"the build process was killed {spent}, most likely for memory; use a machine with more memory")
    if code < 0:
        raise UserError(f"the build process died of {signal.Signals(-code).name} {spent}: {_last_line(log)}")
    if not answer.exists():
        raise UserError(f"the build process ended with code {code} {spent}: {_last_line(log)}")
    said = json.loads(answer.read_text())
    if "error" in said:
        raise UserError(said["error"])
    return Finished(said, round(seconds, 2), memory)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait; the most memory the process held. Not wait4's ru_maxrss, in which a child starts with its parent's."""
    most = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):  # it just ended
            status = Path(f"/proc/{process.pid}/status").read_text()
            most = max([most, *(int(line.split()[1]) * 1024 for line in status.splitlines() if line[:6] == "VmHWM:")])
        time.sleep(0.05)
    return most


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
