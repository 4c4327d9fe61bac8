"""Losses by a judge, kept in a file: a build that was stopped does not compute them again, nor gets others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pdtrim_deploy.local.row_log import RowLog
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.finalists import Judge
from pdtrim_deploy.pruning.solution import Solution


class CachedJudge:
    """A judge whose losses are written to a file, each as soon as it is computed.

    Args:
        about: everything (JSON) that losses depend on, besides what is judged; losses about anything else are dropped.

    Raises:
        UserError: the file cannot be written.

    """

    def __init__(self, judge: Judge, file: Path, about: object) -> None:
        self._judge, self._log = judge, RowLog(file, about)
        self._log.begin()

    def __call__(self, stage: Stage, prefill: Solution, solutions: Sequence[Solution]) -> list[float]:
        """As `Judge`; has only those judged that are not in the file."""
        keys = [{"stage": stage, "prefill": str(prefill), "solution": str(solution)} for solution in solutions]
        fresh = [at for at, key in enumerate(keys) if self._log.find(**key) is None]
        losses = self._judge(stage, prefill, [solutions[at] for at in fresh]) if fresh else ()
        for at, loss in zip(fresh, losses, strict=True):
            self._log.append(keys[at] | {"judged": loss})
        return [float((self._log.find(**key) or {})["judged"]) for key in keys]
