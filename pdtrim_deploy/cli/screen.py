"""The console for tables: as wide as the terminal, and very wide in a file or a pipe, so that nothing is cut off."""

from __future__ import annotations

import os
import sys

from rich.console import Console

WIDE = 160  # columns


def console() -> Console:
    """The console of stdout; COLUMNS sets its width. Brackets, as in the name of a folder, stay as they are."""
    return Console(markup=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE)
