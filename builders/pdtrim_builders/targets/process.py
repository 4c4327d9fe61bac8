"""A build step in a fresh process: what it answers, how long it took, how much memory, and how it died."""

from __future__ import annotations

import json
import os
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
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
    process.returncode = code = os.waitstatus_to_exitcode(status)
    seconds, memory = time.monotonic() - started, usage.ru_maxrss * 1024
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


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
