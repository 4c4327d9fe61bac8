"""Where tables go: as wide as the terminal, and wide where there is none: nothing is cut off in a file or a pipe."""

from __future__ import annotations

import os
import sys

from rich.console import Console

WIDE = 160  # columns


def console() -> Console:
    """Of stdout; COLUMNS, where it is set, is obeyed."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)
