"""Runs a Python file within limits: `python limited.py FILE CPU_SECONDS`. A program of the standard library alone.

Its network is taken away (Linux namespaces) where its user may do that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys

MEMORY, FILE, FILES = 1 << 30, 1 << 24, 64
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000


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


if __name__ == "__main__":
    limit(int(sys.argv[2]))
    os.execv(sys.executable, [sys.executable, "-I", sys.argv[1]])
