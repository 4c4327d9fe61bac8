"""Workers whose computing process runs a part of the time only, so that a test can act in the middle of a prefill."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from pdtrim_deploy.serving.process import session_members

SLICE_S = 0.02


def scheduler(leader: int, rank: int = 0) -> int:
    """The process that computes as that rank of a worker: SGLang starts them first, in the order of ranks."""
    return sorted(pid for pid in session_members(leader) if pid != leader)[rank]


@contextlib.contextmanager
def slowed(pid: int, times: int) -> Iterator[None]:
    """Inside, the process runs a `times`-th of the time."""
    over = threading.Event()

    def slow() -> None:
        while not over.wait(SLICE_S):
            os.kill(pid, signal.SIGSTOP)
            over.wait(SLICE_S * (times - 1))
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
