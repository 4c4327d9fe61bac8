"""Each round removes the block whose absence costs the least calibration loss: SLEB (arXiv:2402.09025) with caches.

Hidden states are kept in front of every block, so a candidate costs only what lies behind it; and most candidates are
looked at on a small part of the calibration text, or not at all (`race`).
"""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic

from pdtrim_deploy.pruning.evaluator import mean_loss
from pdtrim_deploy.pruning.search.base import Problem, Progress, SearchResult, Settings, Step, time_left
from pdtrim_deploy.pruning.search.race import ByBatch, Race
from pdtrim_deploy.pruning.units import name_of


@dataclass(frozen=True)
class Greedy:
    """Greedy removal with racing.

    Attributes:
        race_z: a candidate leaves when its loss exceeds the leader's, on the same tokens, by more than `race_z`
            standard errors of the mean paired difference (batch means of 32 tokens, at least 8 of them). At 3, a block
            that is in truth as good as the leader leaves so with probability about 0.001 at each look; halving and
            laziness (`race`) may drop it too. None evaluates every candidate on everything: the argmin, within `TIE`.

    """

    race_z: float | None = 3.0

    def run(self, problem: Problem, progress: Progress) -> SearchResult:
        """Remove one block a round; ties (`race.TIE`) go to the earlier. UserError when the loss is not a number."""
        evaluator, log = problem.evaluator, problem.trajectory
        removed, steps, known = tuple[int, ...](), list[Step](), dict[int, ByBatch]()
        began, here = monotonic(), 0  # rounds made in this run: those read take no time
        total = problem.counts.total
        while problem.forced.saved + len(removed) < total:
            label = f"greedy {problem.forced.saved + len(removed) + 1}/{total}"
            evaluator.settle(problem.without(removed))
            block = Race(problem, removed, known, self.race_z, label, progress).winner()
            removed = (*removed, block)
            row = log.replay()
            if row is None:
                row = {"removed": block, "loss": mean_loss(evaluator, problem.without(removed))}
                row["block_forwards"] = problem.spent
                log.append(**row)
                here += 1
            steps.append(
                Step(len(steps) + 1, block, row["loss"], row.get("seconds", log.seconds), row["block_forwards"])
            )
            left = time_left(began, here, total - problem.forced.saved - len(removed))
            progress(f"{label}: removed {name_of(block)}, loss {row['loss']:.4f}, {left}")
        return SearchResult((*problem.forced.removed, *removed), tuple(steps), problem.forced.distilled)


def search(settings: Settings) -> Greedy:
    """As a recipe asks for it."""
    return Greedy() if settings.racing else Greedy(race_z=None)
