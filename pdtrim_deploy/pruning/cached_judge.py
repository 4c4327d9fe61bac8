"""What a judge said, written down: a build that was stopped does not ask again, nor hear anything else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.finalists import Judge
from pdtrim_deploy.pruning.search.trajectory import Trajectory
from pdtrim_deploy.pruning.solution import Solution


class CachedJudge:
    """A judge whose verdicts stand in a file, each as soon as it is given; those of another judge or text are dropped.

    Args:
        about: everything (JSON) that verdicts depend on, besides what is judged.

    Raises:
        UserError: the file cannot be written.

    """

    def __init__(self, judge: Judge, file: Path, about: object) -> None:
        self._judge, self._log = judge, Trajectory(file, about)
        self._known: dict[str, float] = {}
        while row := self._log.replay():
            self._known[row["of"]] = row["judged"]

    def __call__(self, stage: Stage, prefill: Solution, solutions: Sequence[Solution]) -> list[float]:
        """As `Judge`; asks for those alone that it was never asked for."""
        names = [f"{stage} | {prefill} | {solution}" for solution in solutions]
        fresh = {name: one for name, one in zip(names, solutions, strict=True) if name not in self._known}
        for name, loss in zip(fresh, self._judge(stage, prefill, list(fresh.values())) if fresh else (), strict=True):
            self._known[name] = loss
            self._log.append(of=name, judged=loss)
        return [self._known[name] for name in names]
