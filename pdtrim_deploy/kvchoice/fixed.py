"""Rules that measure nothing: cut no layer, all layers, or random ones."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pdtrim_deploy.kvchoice.base import Cut, Problem, Progress, Sends


@dataclass(frozen=True)
class AllFull:
    """Cut no layer."""

    cut: Cut

    def choose(self, problem: Problem, progress: Progress) -> Sends:
        """All layers full."""
        return self.cut.sends(problem.layers, ())


@dataclass(frozen=True)
class AllSparse:
    """Cut every layer, as StreamingLLM (arXiv:2309.17453) does."""

    cut: Cut

    def choose(self, problem: Problem, progress: Progress) -> Sends:
        """All layers sparse."""
        return self.cut.sends(problem.layers, range(problem.layers))


@dataclass(frozen=True)
class AtRandom:
    """Cut random layers: the baseline that a rule must beat."""

    cut: Cut
    sparse_layers: int

    def choose(self, problem: Problem, progress: Progress) -> Sends:
        """`sparse_layers` layers drawn by the problem's seed."""
        drawn = random.Random(problem.seed)
        return self.cut.best([drawn.random() for _ in range(problem.layers)], self.sparse_layers)
