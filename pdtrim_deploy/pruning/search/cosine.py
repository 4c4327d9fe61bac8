"""One shot by redundancy: the blocks whose output is most like their input go (ShortGPT, arXiv:2403.03853)."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic

from pdtrim_deploy.pruning.redundancy import redundancy
from pdtrim_deploy.pruning.search.base import Problem, Progress, SearchResult, Settings
from pdtrim_deploy.pruning.search.one_shot import take


@dataclass(frozen=True)
class Cosine:
    """Cheap and often wrong: high cosine does not mean harmless. It measures no loss, so its steps carry none."""

    def run(self, problem: Problem, progress: Progress) -> SearchResult:
        """Rank once on the dense model; ties go to the earlier block."""
        began = monotonic()
        score = redundancy(problem.model, problem.ids, progress=progress)
        ranked = sorted(problem.candidates, key=lambda block: (-float(score[block]), block))
        return take(problem, ranked, monotonic() - began, problem.objective.blocks * len(problem.ids))


def search(_: Settings) -> Cosine:
    """As a recipe asks for it."""
    return Cosine()
