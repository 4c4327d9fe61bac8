"""What every table is made with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def where(environment: dict[str, Any], *more: str) -> str:
    """The line under a table: command, machine, versions, and what else chose the figures."""
    machine, versions = environment["machine"], environment["versions"]
    said = f"{machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}, no GPU"
    return f"\n\n`{environment['command']}` on {said}{''.join(f'; {part}' for part in more)}."


def ratio(found: dict[str, float], middle: str = "median", low: str = "least", high: str = "most") -> str:
    """`0.83 (0.73-0.95)`."""
    return f"{found[middle]:.2f} ({found[low]:.2f}-{found[high]:.2f})"
