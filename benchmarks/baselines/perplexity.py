"""One shot by loss: each block is removed alone, and those that cost least go together.

The perplexity criterion of Shortened LLaMA (arXiv:2402.02834).
"""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic

from pdtrim_deploy.pruning.search.base import Problem, Progress, SearchResult, time_left
from pdtrim_deploy.pruning.search.one_shot import take


@dataclass(frozen=True)
class OneShotPerplexity:
    """The losses are those of one block gone; that of the whole choice is not measured."""

    def run(self, problem: Problem, progress: Progress) -> SearchResult:
        """Rank once, on all of the text; ties go to the earlier block. UserError when the loss is not a number.

        All candidates go through one part of the text, then the next; a stopped search goes on at the next part.
        """
        evaluator, log, blocks = problem.evaluator, problem.trajectory, problem.candidates
        evaluator.settle(problem.forced)
        alone, tokens = dict.fromkeys(blocks, 0.0), 0
        began, here = monotonic(), 0
        for batch in range(evaluator.batches):
            row = log.replay()
            if row is None:
                losses = evaluator.evaluate([problem.without((block,)) for block in blocks], batch)
                sums = [float(loss.double().sum()) for loss in losses]
                row = {"batch": batch, "sums": sums, "tokens": losses[0].numel(), "block_forwards": problem.spent}
                log.append(**row)
                here += 1
            alone = {block: alone[block] + more for block, more in zip(blocks, row["sums"], strict=True)}
            tokens += row["tokens"]
            left = time_left(began, here, evaluator.batches - batch - 1)
            best = min(alone.values()) / tokens
            progress(f"perplexity: part {batch + 1} of {evaluator.batches}, best {best:.4f}, {left}")
        ranked = sorted(blocks, key=lambda block: (alone[block], block))
        return take(problem, ranked, log.seconds, problem.spent)
