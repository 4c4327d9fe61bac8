"""Ctrl-C that is obeyed, wherever it falls, and what is said then; a kill that is as gentle."""

from __future__ import annotations

import signal
import sys
from types import FrameType

# How to go on, by command; every other one is over in seconds and has changed nothing.
RESUME = {
    "build": "run the same command again to go on after the last step that was finished",
    "demo": "run the same command again: what is built stays built, servers are stopped",
    "serve": "workers and router are stopped; run the same command again to serve",
    "eval": "nothing was written; run the same command again, it starts anew",
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
        """Note it and raise, as Python's own handler does."""
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
    """Ctrl-C that fell into a callback from which nothing can be raised is obeyed later: no traceback for it."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def _ended(number: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that servers are stopped; the shell's code for the signal."""
    sys.exit(128 + number)
