"""Each round removes the block whose absence costs the least calibration loss: SLEB (arXiv:2402.09025) with caches.

Two things make it cheap: hidden states are kept in front of every block, so a candidate costs only what lies behind
it, and candidates race over growing parts of the calibration text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_deploy.pruning.evaluator import mean_loss
from pdtrim_deploy.pruning.search.base import Problem, Progress, SearchResult, Step
from pdtrim_deploy.pruning.search.racing import unit_means, units_surely_above
from pdtrim_deploy.pruning.solution import Solution


class Greedy:
    """Greedy removal with racing.

    Args:
        race_z: after each batch a candidate leaves when its loss exceeds the leader's, on the same tokens, by more
            than `race_z` standard errors of the mean paired difference (batch means of 32 tokens, at least 8 of
            them). At 3, a block that is in truth as good as the leader leaves with probability about 0.001 at each
            look. None evaluates every candidate on everything: the exact argmin.

    """

    def __init__(self, race_z: float | None = 3.0) -> None:
        self.race_z = race_z

    def run(self, problem: Problem, progress: Progress) -> SearchResult:
        """Remove one block a round; ties go to the earlier block. UserError when the loss is not a number."""
        evaluator, log = problem.evaluator, problem.trajectory
        removed, steps = tuple[int, ...](), list[Step]()
        while problem.forced.saved + len(removed) < problem.remove:
            label = f"greedy {problem.forced.saved + len(removed) + 1}/{problem.remove}"
            evaluator.settle(problem.without(removed))
            candidates = {b: problem.without((*removed, b)) for b in problem.candidates if b not in removed}
            block = self._race(problem, candidates, label, progress)
            row = log.replay()
            if row is None:
                loss = mean_loss(evaluator, candidates[block])
                row = {"removed": block, "loss": loss, "block_forwards": problem.spent}
                log.append(**row)
            removed = (*removed, block)
            steps.append(
                Step(len(steps) + 1, block, row["loss"], row.get("seconds", log.seconds), row["block_forwards"])
            )
            progress(f"{label}: removed block {block}, loss {row['loss']:.4f}")
        return SearchResult((*problem.forced.removed, *removed), tuple(steps), problem.forced.distilled)

    def _race(self, problem: Problem, candidates: dict[int, Solution], label: str, progress: Progress) -> int:
        """The winner; what each batch said is written down, so that a stopped race goes on behind it."""
        evaluator, log = problem.evaluator, problem.trajectory
        found: dict[int, _Losses] = {block: _Losses() for block in candidates}
        leader, running = -1, list(candidates)
        for batch in range(evaluator.batches):
            row = log.replay()
            if row is None:
                progress(f"{label}: {len(running)} candidates, batch {batch + 1}/{evaluator.batches}")
                fresh = evaluator.evaluate([candidates[block] for block in running], batch)
                losses = [_Losses.of(values) for values in fresh]
                row = {"race": [(b, *vars(one).values()) for b, one in zip(running, losses, strict=True)]}
                log.append(**row, block_forwards=problem.spent)
            for block, *more in row["race"]:
                found[block] = found[block].and_(_Losses(*more))
            leader = min(running, key=lambda block: (found[block].mean, block))
            running = [block for block in running if not found[block].surely_above(found[leader], self.race_z)]
            if len(running) == 1:
                break
        return leader


@dataclass(frozen=True)
class _Losses:
    """Sum and number of token losses, and their unit means (`racing`)."""

    total: float = 0.0
    count: int = 0
    units: tuple[float, ...] = ()

    @classmethod
    def of(cls, losses: Tensor) -> _Losses:
        return cls(float(losses.double().sum()), losses.numel(), tuple(unit_means(losses).tolist()))

    @property
    def mean(self) -> float:
        return self.total / self.count

    def and_(self, more: _Losses) -> _Losses:
        return _Losses(self.total + more.total, self.count + more.count, (*self.units, *more.units))

    def surely_above(self, leader: _Losses, z: float | None) -> bool:
        units = torch.tensor(self.units, dtype=torch.float64) - torch.tensor(leader.units, dtype=torch.float64)
        return units_surely_above(self.mean - leader.mean, units, 0, z)
