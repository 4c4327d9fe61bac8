"""A child process that can still be awaited after Ctrl-C fell into an earlier look at it."""

from __future__ import annotations

import os
import subprocess
import time
from typing import AnyStr

POLL_S = 0.05


class Child(subprocess.Popen[AnyStr]):
    """Popen without the lock of `poll` and `wait`, for children that one thread alone awaits.

    Python's `poll` takes its lock, and only then enters the `try` that gives it back (3.11,
    `subprocess.py`, `_internal_poll`). A KeyboardInterrupt between the two leaves it taken, and every later `wait`
    without a timeout waits for ever: one in six of those that fall into `poll`.
    """

    def poll(self) -> int | None:
        """None while it runs, else its exit code, negative for a signal; after an interrupt it may be called again."""
        if self.returncode is None:
            try:
                ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # SIGCHLD is ignored, and the system keeps no code
                self.returncode = 0
                return 0
            if ended is not None:
                self.returncode = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                os.waitpid(self.pid, 0)  # the system may forget it now
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it runs on after `timeout` seconds.

        """
        end = None if timeout is None else time.monotonic() + timeout
        delay = 0.0005
        while (code := self.poll()) is None:
            left = POLL_S if end is None else end - time.monotonic()
            if timeout is not None and left <= 0:
                raise subprocess.TimeoutExpired(self.args, timeout)
            delay = min(2 * delay, POLL_S, left)
            time.sleep(delay)
        return code
