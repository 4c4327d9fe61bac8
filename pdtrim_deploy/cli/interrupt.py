"""Ctrl-C that is obeyed: a library that swallows KeyboardInterrupt (torch does while it is imported) only delays it."""

from __future__ import annotations

import signal
from types import FrameType


class Interrupt:
    """The handler of SIGINT; `asked` once Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note it and raise, as Python's own handler does."""
        self.asked = True
        raise KeyboardInterrupt


def install() -> None:
    """Take SIGINT, unless it is ignored (`nohup`, a shell's background job)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, Interrupt())


def obey() -> None:
    """Raise KeyboardInterrupt when Ctrl-C was pressed and we still run."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, Interrupt) and handler.asked:
        raise KeyboardInterrupt
