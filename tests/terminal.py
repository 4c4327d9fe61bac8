"""A command in a terminal of its own, where Ctrl-C is a key."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time

CTRL_C = b"\x03"


class Terminal:
    """`python -m pdtrim_deploy ARGS`; `screen` is all of its output, escape codes included."""

    def __init__(self, *args: object, **environment: str) -> None:
        self.screen = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ.update(environment, TERM="xterm")
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)  # ignored in a background job or by nohup
            os.execv(sys.executable, [sys.executable, "-m", "pdtrim_deploy", *map(str, args)])

    def read_until(self, pattern: str | None, seconds: float = 120) -> None:
        """Read until `pattern` (a regular expression) is on the screen, or the command has ended."""
        end = time.monotonic() + seconds
        while pattern is None or not re.search(pattern, self.screen):
            assert time.monotonic() < end, self.screen
            if not self.read():
                break

    def read(self, seconds: float = 0.1) -> bool:
        """Read new output, waiting briefly for it; False when the command has ended."""
        if select.select([self._fd], [], [], seconds)[0]:
            try:
                self.screen += os.read(self._fd, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                return False
        return True

    @property
    def text(self) -> str:
        """The screen without escape codes."""
        return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", self.screen).replace("\r\n", "\n")

    def press(self, keys: bytes) -> None:
        """Send a key press."""
        os.write(self._fd, keys)

    def ended(self, seconds: float = 120) -> int:
        """Its exit code."""
        self.read_until(None, seconds)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
