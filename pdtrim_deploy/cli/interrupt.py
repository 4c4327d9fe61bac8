"""Ctrl-C stops a command wherever it falls, with one sentence; SIGTERM and SIGHUP stop servers too."""

from __future__ import annotations

import signal
import sys
from types import FrameType

# How to resume each command; all others end in seconds and have changed nothing.
RESUME = {
    "build": "run the same command again to resume after the last finished step",
    "demo": "run the same command again: finished builds are reused, servers are stopped",
    "serve": "workers and router are stopped; run the same command again to serve",
    "eval": "the report is written at the end, answers of finished tasks before; run the same command again, "
    "it starts anew",
    "fidelity": "nothing was written, what was started for it is stopped; run the same command again",
    "loadtest": "the load is lost, what was started for it is stopped; run the same command again",
    "compare": "the rounds are lost, what was started for them is stopped; run the same command again",
}
OTHERWISE = "run the same command again"


class Interrupt:
    """The handler of SIGINT; `requested` once Ctrl-C was pressed.

    A library that swallows KeyboardInterrupt (torch does while it is imported) only delays it: see `obey`.
    """

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Set `requested` and raise, as Python's own handler does."""
        self.requested = True
        raise KeyboardInterrupt


def install() -> None:
    """Take SIGINT, SIGTERM and SIGHUP, unless they are ignored (`nohup`, a shell's background job)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, Interrupt())
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _swallowed
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _ended)


def pressed() -> bool:
    """Whether Ctrl-C was pressed."""
    handler = signal.getsignal(signal.SIGINT)
    return isinstance(handler, Interrupt) and handler.requested


def obey() -> None:
    """Raise KeyboardInterrupt when Ctrl-C was pressed and we still run."""
    if pressed():
        raise KeyboardInterrupt


def _swallowed(unraisable: sys.UnraisableHookArgs) -> None:
    """Print no traceback for a Ctrl-C inside a callback that cannot raise: `obey` raises it later."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def _ended(number: int, frame: FrameType | None) -> None:
    """Exit by an exception, so that servers are stopped, with the shell's exit code for the signal."""
    sys.exit(128 + number)
