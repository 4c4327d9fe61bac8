"""Memory that a process has freed, given back to the operating system."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress


def give_back() -> None:
    """Collect what refers to itself; then have glibc return the pages of its heaps that nothing lies on.

    By itself it keeps them for the next tensor, and a step would seem to take what an earlier one did. With another C
    library the pages stay: malloc_trim(3) is GNU's.
    """
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
