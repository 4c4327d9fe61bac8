"""Memory that a process has freed, given back to the operating system."""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import suppress
from pathlib import Path

SMALL = 1_000_000_000
"""Resident bytes below which a process has little to give back, and collecting takes longer than a small step."""


def give_back() -> None:
    """Collect what refers to itself; then have glibc return the pages of its heaps that nothing lies on.

    By itself it keeps them for the next tensor, and a step would seem to take what an earlier one did. With another C
    library the pages stay: malloc_trim(3) is GNU's.
    """
    if _resident() < SMALL:
        return
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident() -> int:
    """Bytes of memory that this process holds (Linux); elsewhere as if it were large."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return SMALL
