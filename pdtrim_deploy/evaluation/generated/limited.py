"""Runs a Python file within limits: `python limited.py FILE CPU_SECONDS`. A program of the standard library alone.

Its network is taken away (Linux namespaces) where its user may do that. When it ends, and on SIGTERM, all that it
started is killed, in other sessions too: orphans become children of this process (Linux).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys

MEMORY, FILE, FILES = 1 << 30, 1 << 24, 64
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
_SET_CHILD_SUBREAPER = 36


def limit(cpu_s: int) -> None:
    """Of this process and what it becomes; OSError or ValueError where a limit cannot be set."""
    for kind, most in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_NOFILE, FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    with contextlib.suppress(AttributeError):  # no Linux
        libc = ctypes.CDLL(None)
        if libc.unshare(_NEW_NETWORK):
            libc.unshare(_NEW_USER | _NEW_NETWORK)


def run(file: str, cpu_s: int) -> int:
    """The exit code of the program in `file`; nothing that it started is left."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        limit(cpu_s)
        os.execv(sys.executable, [sys.executable, "-I", file])
    try:
        return 0 if os.waitpid(child, 0)[1] == 0 else 1
    finally:
        kill_children()


def kill_children() -> None:
    """Until there is none; a child's own children become this process's when it is gone."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)


def _children() -> list[int]:
    with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]
    return []


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], int(sys.argv[2])))
