"""Each round removes the block whose absence costs the least calibration loss (SLEB, arXiv:2402.09025).

Three things make it cheap: hidden states are kept in front of every block, so a candidate costs only what lies
behind it; candidates race over growing parts of the calibration text; the winner's run renews the kept states.
"""

from __future__ import annotations

import math
from time import monotonic

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.hidden_states import HiddenStates
from pdtrim_deploy.pruning.search.base import Problem, Progress, SearchResult, Step

_UNIT_TOKENS = 32
_LEAST_UNITS = 8


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
        objective, began, before = problem.objective, monotonic(), problem.objective.block_forwards
        removed, steps = list(problem.forced), list[Step]()
        if len(removed) == problem.remove:
            return SearchResult(problem.forced, ())
        states, candidates = HiddenStates(objective, removed), list(problem.candidates)
        while len(removed) < problem.remove:
            block = self._race(states, candidates, f"greedy {len(removed) + 1}/{problem.remove}", progress)
            loss = states.remove(block)
            removed.append(block)
            candidates.remove(block)
            spent = objective.block_forwards - before
            steps.append(Step(len(steps) + 1, block, loss, monotonic() - began, spent))
            progress(f"greedy {len(removed)}/{problem.remove}: removed block {block}, loss {loss:.4f}")
        return SearchResult(tuple(removed), tuple(steps))

    def _race(self, states: HiddenStates, candidates: list[int], label: str, progress: Progress) -> int:
        losses: dict[int, Tensor] = {}
        leader, running = -1, candidates
        for batch in range(states.objective.batches):
            progress(f"{label}: {len(running)} candidates, batch {batch + 1}/{states.objective.batches}")
            fresh = {block: states.without(block, batch) for block in running}
            losses = {b: torch.cat((losses[b], new)) if batch else new for b, new in fresh.items()}
            means = {block: float(values.double().mean()) for block, values in losses.items()}
            if not all(map(math.isfinite, means.values())):
                raise UserError("the calibration loss is not a number; load the model in float32, check its weights")
            leader = min(running, key=lambda block: (means[block], block))
            running = [b for b in running if not self._beaten(losses[b] - losses[leader])]
            if len(running) == 1:
                break
        return leader

    def _beaten(self, excess: Tensor) -> bool:
        """Is the mean of paired differences `[sequences, scored]` surely above zero?"""
        units = torch.cat([part.double().mean(1) for part in excess.split(_UNIT_TOKENS, dim=1)])
        if self.race_z is None or len(units) < _LEAST_UNITS:
            return False
        return float(excess.double().mean()) > self.race_z * float(units.std()) / math.sqrt(len(units))
