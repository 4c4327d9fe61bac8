"""What methods share that rank blocks once and take the first."""

from __future__ import annotations

from collections.abc import Sequence

from pdtrim_deploy.pruning.search.base import Problem, SearchResult, Step


def take(problem: Problem, ranked: Sequence[int], seconds: float, block_forwards: int) -> SearchResult:
    """The first of `ranked` that are still to go. No loss was measured of what they leave together."""
    chosen = ranked[: problem.remove - problem.forced.saved]
    steps = tuple(Step(i, block, None, seconds, block_forwards) for i, block in enumerate(chosen, 1))
    return SearchResult((*problem.forced.removed, *chosen), steps, problem.forced.distilled)
