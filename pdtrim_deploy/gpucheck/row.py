"""What a part of the check on a GPU says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One part: whether it ran, failed, or was skipped, why, and its figures."""

    part: str
    status: Literal["run", "failed", "skipped"]
    reason: str = ""
    figure: dict[str, float | int | str] | None = None
