"""A window of adjacent blocks whose end is most like its start (LLM-Streamline, arXiv:2403.19135), without its layer.

The layer that LLM-Streamline then trains in the window's place is the business of `pruning.students`.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.redundancy import similarity
from pdtrim_deploy.pruning.search.base import Problem, Progress, SearchResult, Settings
from pdtrim_deploy.pruning.search.one_shot import take


@dataclass(frozen=True)
class Streamline:
    """argmax over l of cos(x_l, x_{l+n}); what is forced lies within the window where that can be."""

    def run(self, problem: Problem, progress: Progress) -> SearchResult:
        """The best window without protected blocks; ties go to the earlier. UserError where there is none."""
        began, blocks, count = monotonic(), problem.objective.blocks, problem.remove - problem.forced.saved
        windows = [w for w in _windows(problem, count) if set(problem.forced.removed) <= set(w)]
        windows = windows or _windows(problem, count)
        if not windows:
            raise UserError(f"no {count} adjacent blocks may go; remove fewer, or choose another pruning method")
        lengths = sorted({len(window) for window in windows})
        cosine = similarity(problem.model, problem.ids, lengths, progress=progress) if count else {}
        best = max(windows, key=lambda w: (float(cosine[len(w)][w[0]]), -w[0])) if count else range(0)
        chosen = [block for block in best if block in problem.candidates]
        return take(problem, chosen, monotonic() - began, blocks * len(problem.ids))


def search(_: Settings) -> Streamline:
    """As a recipe asks for it."""
    return Streamline()


def _windows(problem: Problem, count: int) -> list[range]:
    """Runs of blocks with just `count` candidates, starting and ending with what goes, nothing in them that stays."""
    blocks, candidates = problem.objective.blocks, set(problem.candidates)
    goes = candidates | set(problem.forced.removed)
    runs = (range(lo, hi) for lo in range(blocks) for hi in range(lo + 1, blocks + 1))
    return [run for run in runs if set(run) <= goes and len(candidates.intersection(run)) == count]
