"""Each round removes the block whose absence costs the least calibration loss: SLEB (arXiv:2402.09025) with caches.

Two things make it cheap: hidden states are kept in front of every block, so a candidate costs only what lies behind
it, and candidates race over growing parts of the calibration text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_deploy.pruning.evaluator import Evaluator, mean_loss
from pdtrim_deploy.pruning.search.base import Problem, Progress, SearchResult, Step
from pdtrim_deploy.pruning.search.racing import surely_above
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
            row = log.replay()
            if row is None:
                evaluator.settle(problem.without(removed))
                candidates = {b: problem.without((*removed, b)) for b in problem.candidates if b not in removed}
                block = self._race(evaluator, candidates, label, progress)
                loss = mean_loss(evaluator, candidates[block])
                row = {"removed": block, "loss": loss, "block_forwards": problem.spent}
                log.append(**row)
            removed = (*removed, row["removed"])
            steps.append(
                Step(
                    len(steps) + 1, row["removed"], row["loss"], row.get("seconds", log.seconds), row["block_forwards"]
                )
            )
            progress(f"{label}: removed block {row['removed']}, loss {row['loss']:.4f}")
        return SearchResult((*problem.forced.removed, *removed), tuple(steps), problem.forced.distilled)

    def _race(self, evaluator: Evaluator, candidates: dict[int, Solution], label: str, progress: Progress) -> int:
        losses: dict[int, Tensor] = {}
        leader, running = -1, list(candidates)
        for batch in range(evaluator.batches):
            progress(f"{label}: {len(running)} candidates, batch {batch + 1}/{evaluator.batches}")
            fresh = evaluator.evaluate([candidates[block] for block in running], batch)
            parts = zip(running, fresh, strict=True)
            losses = {block: torch.cat((losses[block], new)) if batch else new for block, new in parts}
            means = {block: float(values.double().mean()) for block, values in losses.items()}
            leader = min(running, key=lambda block: (means[block], block))
            running = [b for b in running if not surely_above(losses[b] - losses[leader], 0, self.race_z)]
            if len(running) == 1:
                break
        return leader
