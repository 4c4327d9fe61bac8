"""Progress of a long command on stderr: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from pdtrim_deploy.cli.interrupt import obey


class Progress:
    """`show` wraps steps and `note` says what goes on inside one."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live: Status | None = None
        self._step = ""
        self._noted_at = 0.0

    @contextmanager
    def show(self, name: str, done: bool = False) -> Iterator[None]:
        """One step: its name and, when it ends well, its seconds."""
        obey()
        if done:
            self._console.print(f"{name}: done before")
            yield
            return
        self._step, started = name, time.perf_counter()
        if sys.stderr.isatty():
            with Status(f"{name} ...", console=self._console) as self._live:
                yield
            self._live = None
        else:
            self._console.print(f"{name} ...")
            yield
        self._console.print(f"{name}: {time.perf_counter() - started:.1f} s")

    def note(self, text: str) -> None:
        """Replace the live line; where lines stay, at most one every two seconds."""
        obey()
        if self._live is not None:
            self._live.update(f"{self._step}: {escape(text)}")
        elif time.perf_counter() - self._noted_at > 2:
            self._noted_at = time.perf_counter()
            self._console.print(f"  {escape(text)}")
