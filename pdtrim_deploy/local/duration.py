"""Seconds for a reader."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """In a unit of which there are at least two."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
