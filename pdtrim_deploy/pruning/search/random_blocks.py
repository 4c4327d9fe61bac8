"""Any blocks: what a method must beat."""

from __future__ import annotations

import random

from pdtrim_deploy.pruning.search.base import Problem, Progress, SearchResult, Settings
from pdtrim_deploy.pruning.search.one_shot import take


class RandomBlocks:
    """Drawn evenly by seed."""

    def __init__(self, settings: Settings) -> None:
        self.seed = settings.seed

    def run(self, problem: Problem, progress: Progress) -> SearchResult:
        """A permutation's first blocks."""
        candidates = list(problem.candidates)
        return take(problem, random.Random(self.seed).sample(candidates, len(candidates)), 0, 0)
