"""Rows of benchmarks/pruning.py: where they stand, and when they are of the same sizes."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from __pruning_choice import Choice
from __pruning_methods import METHODS
from __results import HERE

from pdtrim_deploy.local.row_log import RowLog

SEARCHED = ("calibration", "length")
FITTED = (*SEARCHED, "text", "training_steps")
SHAPES = (*FITTED, "sequences", "prompt", "continuation", "questions", "steps")
STEPS = 100  # rows of this many stand where they stood before other numbers were told apart
_JUDGED = ("fit_seconds", "brown_ppl", "austen_ppl", "choice", "choice_loss", "unified_ppl")


def folder(options: argparse.Namespace, names: tuple[str, ...]) -> Path:
    """Where all that depends on these options alone is kept."""
    sizes = {name: getattr(options, name) for name in names if name != "steps" or options.steps != STEPS}
    key = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:12]
    place = HERE.parent / "out" / "bench-pruning" / key
    place.mkdir(parents=True, exist_ok=True)
    return place


class Rows:
    """Rows kept on disk for one set of sizes; a new file begins with `known`."""

    def __init__(self, file: Path, known: list[dict[str, Any]]) -> None:
        self._log = RowLog(file, "rows of bench-pruning")
        if not self._log.exists:
            self._log.append(*known)

    def read(self) -> list[dict[str, Any]]:
        """All of them."""
        return list(self._log.rows)

    def has(self, method: str, removed: int, seed: int) -> bool:
        """Whether there is such a row."""
        return self._log.find(method=method, removed=removed, seed=seed) is not None

    def chosen(self, method: str, removed: int, seed: int) -> Choice | None:
        """What a method that chooses alike has chosen."""
        for known in self.read():
            if (known["removed"], known["seed"]) == (removed, seed):
                other = METHODS[known["method"]]
                if other.choosing == METHODS[method].choosing and not other.published:
                    return Choice.read(known)
        return None

    def alike(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """How the very same plan was judged, and at which commit, if the same was done for what is left."""
        treatment = METHODS[row["method"]].treatment
        for known in self.read():
            same = known["removed"] and all(known[stage] == row[stage] for stage in ("prefill", "decode"))
            if same and METHODS[known["method"]].treatment == treatment:
                return {name: known[name] for name in _JUDGED} | {"judged_at": known.get("judged_at", known["commit"])}
        return None

    def add(self, row: dict[str, Any]) -> None:
        """Write it down, if it was judged."""
        if "brown_ppl" in row:
            self._log.append(row)
