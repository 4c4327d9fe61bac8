"""The last few solutions of a search, judged again as they will be used.

A search weighs blocks as they are. Once what is left is compensated, another solution may be the better one: one gap
is closed more easily than three. So the search's answer, where it began, the best run of adjacent blocks (where whole
blocks go alone) and the next best that it took are judged by a `Judge`, and the best of them is the answer. What
methods choose that measure no loss may be judged beside them, so that the answer is no worse than theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any, Protocol

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.evaluator import Evaluator, mean_loss
from pdtrim_deploy.pruning.search import NO_COST, Cost, Problem, Search, SearchResult, Trajectory
from pdtrim_deploy.pruning.solution import Solution


class Judge(Protocol):
    """What solutions lose in the end, as it is computed; `prefill` is what prefill lost, when `stage` is decode."""

    def __call__(self, stage: Stage, prefill: Solution, solutions: Sequence[Solution]) -> Iterable[float]: ...


@dataclass(frozen=True)
class FinalRound:
    """A judge, how many solutions of each search it judges, and by name the methods whose choices it judges besides."""

    judge: Judge
    count: int
    baselines: Mapping[str, Search] = field(default_factory=dict)


@dataclass(frozen=True)
class Finalist:
    """A solution and what it loses, nats a token of calibration text: as the search has it, and as the judge has it."""

    solution: Solution
    loss: float
    judged: float


def judge_finalists(
    stage: Stage,
    problem: Problem,
    result: SearchResult,
    final_round: FinalRound,
    log: Trajectory,
    progress: Callable[[str], None],
) -> tuple[tuple[Finalist, ...], Cost]:
    """The finalists, best first in the judge's eyes, and the cost of evaluating them (the judge's own left out).

    Where all candidates are one solution there is nothing to judge, and none is named. Ties go to the search's own
    order. What is evaluated for this stands in `log`. UserError when a loss is not a number.
    """
    evaluated = _Evaluated(problem.evaluator, log)
    windows = [] if problem.sublayers.total else [_window(problem, evaluated)]
    ranked = (result.solution, *result.others[:1], *windows, *result.others[1:])
    chosen, spent = _by_baselines(problem, final_round.baselines, progress)
    solutions = [*dict.fromkeys([*[*dict.fromkeys(ranked)][: final_round.count], *chosen])]
    if len(solutions) == 1:
        return (), evaluated.cost + spent
    losses = evaluated.row("finalists", lambda: [mean_loss(problem.evaluator, solution) for solution in solutions])
    judged = list(final_round.judge(stage, problem.forced, solutions))
    if not all(map(math.isfinite, judged)):
        raise UserError("a finalist's loss is not a number; load the model in float32, check its weights")
    evaluated.row("judged", lambda: judged)  # and with it the seconds that this took
    finalists = [Finalist(*row) for row in zip(solutions, losses, judged, strict=True)]
    for finalist in finalists:
        progress(f"finalist {finalist.solution.label}: loss {finalist.loss:.4f}, compensated {finalist.judged:.4f}")
    return tuple(sorted(finalists, key=lambda finalist: finalist.judged)), evaluated.cost + spent


def _by_baselines(
    problem: Problem, baselines: Mapping[str, Search], progress: Callable[[str], None]
) -> tuple[list[Solution], Cost]:
    """What they choose, and at what cost; a method that finds nothing here, such as no window, is passed over."""
    solutions, cost = list[Solution](), NO_COST
    for name, search in baselines.items():
        try:
            result = search.run(problem, progress)
        except UserError as error:
            progress(f"{name}: {error}")
            continue
        progress(f"{name} would remove {result.solution.label}")
        solutions.append(result.solution)
        cost += result.cost
    return solutions, cost


class _Evaluated:
    """Rows of the log, those of an earlier run first: a build that was stopped evaluates nothing again."""

    def __init__(self, evaluator: Evaluator, log: Trajectory) -> None:
        self._evaluator, self._log, self._before = evaluator, log, evaluator.block_forwards

    def row(self, name: str, evaluate: Callable[[], list[Any]]) -> list[Any]:
        """What the log has next, or what `evaluate` gives; as JSON has it."""
        row = self._log.replay()
        if row is None:
            row = {name: evaluate()}
            self._log.append(**row, block_forwards=self._block_forwards)
        return list(row[name])

    @property
    def cost(self) -> Cost:
        """So far, earlier runs included."""
        return Cost(self._log.seconds, self._block_forwards)

    @property
    def _block_forwards(self) -> int:
        return self._log.forwards_before + self._evaluator.block_forwards - self._before


def _window(problem: Problem, evaluated: _Evaluated) -> Solution:
    """The run of adjacent candidates that costs least; half of those in play leave after each part of the text."""
    free, size = problem.candidates, problem.remove - problem.forced.saved
    running = [problem.without(free[at : at + size]) for at in range(len(free) - size + 1)]
    losses: dict[Solution, list[float]] = {solution: [] for solution in running}
    for batch in range(problem.evaluator.batches):
        means = evaluated.row("windows", partial(_means, problem.evaluator, running, batch))
        for solution, more in zip(running, means, strict=True):
            losses[solution] += more
        running = sorted(running, key=lambda solution: fmean(losses[solution]))[: math.ceil(len(running) / 2)]
    return running[0]


def _means(evaluator: Evaluator, solutions: list[Solution], batch: int) -> list[list[float]]:
    """Of each solution, each sequence's mean loss."""
    return [losses.double().mean(1).tolist() for losses in evaluator.evaluate(solutions, batch)]
