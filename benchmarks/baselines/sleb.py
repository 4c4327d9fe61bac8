"""SLEB as published (arXiv:2402.09025): greedy, every candidate a whole pass of the model over all of the text.

The first and the last block stay. `greedy` is the same idea with nothing computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.search.base import Problem, Progress, SearchResult, Step, time_left


@dataclass(frozen=True)
class SLEB:
    """Nothing is kept, nobody leaves early."""

    def run(self, problem: Problem, progress: Progress) -> SearchResult:
        """Remove one block a round; ties go to the earlier block. UserError when the loss is not a number."""
        log, steps, removed = problem.trajectory, list[Step](), tuple[int, ...]()
        while problem.forced.saved + len(removed) < problem.remove:
            row = log.replay()
            if row is None:
                row = self._round(problem, removed, progress)
                log.append(**row)
            removed = (*removed, row["removed"])
            steps.append(
                Step(len(removed), row["removed"], row["loss"], row.get("seconds", log.seconds), row["block_forwards"])
            )
        return SearchResult((*problem.forced.removed, *removed), tuple(steps), problem.forced.distilled)

    def _round(self, problem: Problem, removed: tuple[int, ...], progress: Progress) -> dict[str, Any]:
        left = [block for block in problem.candidates if block not in removed]
        inner = [block for block in left if block not in (0, problem.objective.blocks - 1)]
        losses, began = dict[int, float](), monotonic()
        rounds = problem.remove - problem.forced.saved - len(removed)
        for block in inner or left:
            losses[block] = self._loss(problem, (*removed, block))
            done, of = len(losses), len(inner or left)
            left_over = rounds * of - rounds * (rounds - 1) // 2 - done  # each round has one candidate fewer
            progress(f"sleb {len(removed) + 1}: {done}/{of} candidates, {time_left(began, done, left_over)}")
        best = min(losses, key=lambda block: (losses[block], block))
        return {"removed": best, "loss": losses[best], "block_forwards": problem.spent}

    def _loss(self, problem: Problem, removed: tuple[int, ...]) -> float:
        objective, parts = problem.objective, []
        for batch in range(objective.batches):
            hidden = objective.start(batch)
            for op in problem.without(removed).route(objective.blocks):
                hidden = objective.run(batch, op, hidden)
            parts.append(objective.losses(batch, hidden))
        losses = torch.cat(parts)
        if not bool(torch.isfinite(losses).all()):
            raise UserError("the calibration loss is not a number; load the model in float32, check its weights")
        return float(losses.double().mean())
