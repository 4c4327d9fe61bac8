"""One child program and its descendants: a session of its own, one log file, and an end of all of them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pdtrim_deploy.local.child import Child
from pdtrim_deploy.local.job import dies_with

TAIL_BYTES = 64 << 10
REASON = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt)\b.*", re.MULTILINE)


class ServerProcess:
    """A started program. It dies with the thread that starts it, so start it in a long-lived thread (the main one)."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.name, self.command, self.log = name, list(command), log
        with log.open("wb") as output:
            output.write(f"$ {' '.join(self.command)}\n".encode())
            output.flush()
            self._popen = Child(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=log.parent,  # `python -m` puts the working folder on sys.path: it must not hold modules of the user
                start_new_session=True,
                preexec_fn=dies_with(os.getpid()),
            )
        self.pid = self._popen.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._popen.poll()

    def terminate(self) -> None:
        """SIGTERM to the program alone: SGLang ends its own children, and reports one that we end as a crash."""
        if self.exit_code() is None:
            self._popen.terminate()

    def finish(self, deadline: float) -> None:
        """Wait until `deadline` (time.monotonic) for the end, then kill the rest of the session."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(max(0.0, deadline - time.monotonic()))
        while session_members(self.pid):  # each round kills all members; a fork in between needs another round
            for pid in session_members(self.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        self._popen.wait()

    def obituary(self, lines: int = 20) -> str:
        """The program's name, how it ended, the last error of its log, and the log's last lines."""
        code = self.exit_code()
        how = (
            f"was ended by {signal.Signals(-code).name}"
            if code is not None and code < 0
            else f"ended with exit code {code}"
        )
        text = log_tail(self.log)
        reasons = REASON.findall(text)
        named = [reason for reason in reasons if "pdtrim: " in reason] or reasons  # other processes end because of it
        why = f": {named[-1].strip()}" if named else ""
        last = "\n".join(f"  | {line}" for line in text.splitlines()[-lines:])
        return f"{self.name} {how}{why}\nlast lines of {self.log}:\n{last}"


def stop_all(processes: Iterable[ServerProcess], timeout_s: float) -> None:
    """End all at once: SIGTERM, up to `timeout_s` seconds, SIGKILL. Interrupted, it kills at once and then raises."""
    processes = list(processes)
    deadline = time.monotonic() + timeout_s
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.finish(deadline)
    except BaseException:
        for process in processes:
            process.finish(0.0)
        raise


def session_members(session: int) -> list[int]:
    """Living processes of a session, from /proc (Linux), also those that left the leader's process group."""
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                # pid (comm) state ppid pgrp session ...; comm may hold spaces and parentheses
                state, _, _, sid = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:4]
                if int(sid) == session and state not in "ZX":
                    members.append(int(entry))
    return members


def log_tail(log: Path) -> str:
    """The last 64 KiB of a log as text."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")
