"""One shot by loss: each block is removed alone, and those that cost least go together.

The perplexity criterion of Shortened LLaMA (arXiv:2402.02834).
"""

from __future__ import annotations

from time import monotonic

from pdtrim_deploy.pruning.evaluator import mean_loss
from pdtrim_deploy.pruning.search.base import Problem, Progress, SearchResult, time_left
from pdtrim_deploy.pruning.search.one_shot import take


class OneShotPerplexity:
    """The losses are those of one block gone; that of the whole choice is not measured."""

    def run(self, problem: Problem, progress: Progress) -> SearchResult:
        """Rank once, on all of the text; ties go to the earlier block. UserError when the loss is not a number."""
        began, evaluator = monotonic(), problem.evaluator
        evaluator.settle(problem.forced)
        alone = dict[int, float]()
        for block in problem.candidates:
            alone[block] = mean_loss(evaluator, problem.without((block,)))
            done, of = len(alone), len(problem.candidates)
            progress(f"perplexity: {done}/{of} blocks, {time_left(began, done, of - done)}")
        return take(problem, sorted(alone, key=lambda block: (alone[block], block)), began, problem.spent)
