"""What a benchmark prints as it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable

Note = Callable[[str], None]


def timed_notes() -> Note:
    """Print each line behind the seconds since this call."""
    started = time.monotonic()

    def note(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)

    return note
