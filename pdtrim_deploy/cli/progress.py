"""Progress of a long command on stderr: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from pdtrim_deploy.cli.interrupt import obey
from pdtrim_deploy.cli.time_left import TimeLeft

BETWEEN_NOTES_S = 2.0  # where lines stay
SILENCE_S = 10.0  # after which a step that says nothing is said to go on


class Progress:
    """`show` wraps steps and `note` says what goes on inside one."""

    def __init__(self, silence_s: float = SILENCE_S) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live: Status | None = None
        self._step, self._last = "", ""
        self._printed = 0.0
        self._silence_s = silence_s
        self._time_left = TimeLeft()

    @contextmanager
    def show(self, name: str, done: bool = False) -> Iterator[None]:
        """One step: its name and, when it ends well, its seconds."""
        obey()
        name = escape(name)
        if done:
            self._console.print(f"{name}: done before")
            yield
            return
        self._step, self._last, started = name, "", time.perf_counter()
        if sys.stderr.isatty():
            try:
                with Status(f"{name} ...", console=self._console) as self._live, self._watched(started), self._logged():
                    yield
            finally:
                self._live = None
        else:
            self._print(f"{name} ...")
            with self._watched(started), self._logged():
                yield
        self._print(f"{name}: {time.perf_counter() - started:.1f} s")

    def note(self, text: str) -> None:
        """Replace the live line; where lines stay, at most one every two seconds."""
        obey()
        text = self._last = self._time_left.of(text)
        if self._live is not None:
            self._live.update(f"{self._step}: {escape(text)}")
        elif time.perf_counter() - self._printed > BETWEEN_NOTES_S:
            self._print(f"  {escape(text)}")

    @contextmanager
    def _logged(self) -> Iterator[None]:
        """Meanwhile what our parts log that know no progress, such as compilers, are notes; warnings stay.

        With `-v` all of it is printed anyway.
        """
        if logging.getLogger().isEnabledFor(logging.INFO):
            yield
            return

        class NoteHandler(logging.Handler):
            def emit(_, record: logging.LogRecord) -> None:
                text = record.getMessage()
                self._print(escape(text)) if record.levelno >= logging.WARNING else self.note(text)

        handler, logger = NoteHandler(), logging.getLogger("pdtrim_deploy")
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)

    def _print(self, text: str) -> None:
        self._printed = time.perf_counter()
        self._console.print(text)

    @contextmanager
    def _watched(self, started: float) -> Iterator[None]:
        """A step's seconds meanwhile: in the live line; where lines stay, in a line when there was none for long."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(min(1.0, self._silence_s)):
                now, text = time.perf_counter(), escape(self._last)
                if self._live is not None:
                    self._live.update(f"{self._step}, {now - started:.0f} s{': ' + text if text else ' ...'}")
                elif now - self._printed >= self._silence_s:
                    self._print(f"  {text or self._step} ({now - started:.0f} s so far)")

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield
        finally:
            ended.set()
            watching.join()
