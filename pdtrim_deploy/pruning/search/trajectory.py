"""What a search did, row by row, with the seconds that it took: a search killed at any moment goes on there."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Any

from pdtrim_deploy.local.row_log import RowLog


class Trajectory:
    """Rows of one search; those that an earlier run of the same search wrote are replayed first.

    Args:
        path: None keeps the rows in memory only.
        about: everything (JSON) that the answer depends on.

    Raises:
        UserError: the file cannot be written; what stands in it stays good.

    """

    def __init__(self, path: Path | None = None, about: Any = None) -> None:
        self._log, self._began, self._next = RowLog(path, about), monotonic(), 0
        self._log.begin()
        self._stored = tuple(self._log.rows)
        last = self._stored[-1] if self._stored else {}
        self.seconds_before: float = last.get("seconds", 0.0)
        self.forwards_before: int = last.get("block_forwards", 0)

    @property
    def seconds(self) -> float:
        """Since the search began, pauses left out."""
        return self.seconds_before + monotonic() - self._began

    def replay(self) -> dict[str, Any] | None:
        """The next row that an earlier run wrote; None when there is no more."""
        if self._next == len(self._stored):
            return None
        self._next += 1
        return self._stored[self._next - 1]

    def append(self, **row: Any) -> None:
        """Write a row to the disk, with the seconds so far."""
        self._log.append(row | {"seconds": round(self.seconds, 3)})
