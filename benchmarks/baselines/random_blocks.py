"""Any blocks: what a method must beat."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pdtrim_deploy.pruning.search.base import Problem, Progress, SearchResult
from pdtrim_deploy.pruning.search.one_shot import take


@dataclass(frozen=True)
class RandomBlocks:
    """Drawn evenly by seed."""

    seed: int

    def run(self, problem: Problem, progress: Progress) -> SearchResult:
        """A permutation's first blocks."""
        candidates = list(problem.candidates)
        return take(problem, random.Random(self.seed).sample(candidates, len(candidates)), 0, 0)
