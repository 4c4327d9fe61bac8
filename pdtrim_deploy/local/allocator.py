"""Memory that a process has freed, given back to the operating system."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

SMALL = 64_000_000
"""Bytes of weights below which a step leaves little behind, and collecting takes longer than the step."""


def give_back(weights: int) -> None:
    """Collect what refers to itself; then `trim`.

    Args:
        weights: bytes of the model that steps work on.

    """
    if weights < SMALL:
        return
    gc.collect()
    trim()


def trim() -> None:
    """Have glibc return the pages of its heaps that nothing lies on.

    By itself it keeps them for the next tensor, and a step would seem to take what an earlier one did. With another C
    library the pages stay: malloc_trim(3) is GNU's.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
