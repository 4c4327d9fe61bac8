"""The last few solutions of a search, judged again as they will be used.

A search weighs blocks as they are. Once what is left is compensated, another solution may be the better one: one gap
is closed more easily than three. So the search's answer, where it began, the best run of adjacent blocks and the next
best that it took are judged by a `Judge`, and the best of them is the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Protocol

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.evaluator import mean_loss
from pdtrim_deploy.pruning.search import Problem, SearchResult, Step, Trajectory
from pdtrim_deploy.pruning.solution import Solution


class Judge(Protocol):
    """What solutions lose in the end, as it is found; `prefill` is what prefill lost, when `stage` is decode."""

    def __call__(self, stage: Stage, prefill: Solution, solutions: Sequence[Solution]) -> Iterable[float]: ...


@dataclass(frozen=True)
class Finalist:
    """A solution and what it loses, nats a token of calibration text.

    Attributes:
        loss, judged: as the search has it, and as the judge has it.
        behind: prefill's only: the judge's loss of the decode found behind it, where that was asked for.

    """

    solution: Solution
    loss: float
    judged: float
    behind: float | None = None


def judge_finalists(
    stage: Stage,
    problem: Problem,
    found: SearchResult,
    judge: Judge,
    count: int,
    log: Trajectory,
    progress: Callable[[str], None],
) -> tuple[SearchResult, tuple[Finalist, ...]]:
    """The best of `count` finalists in the judge's eyes, as the search's result, and all of them, best first.

    Where all candidates are one solution there is nothing to judge, and none is named. Ties go to the search's own
    order. What is evaluated for this stands in `log`. UserError when a loss is not a number.
    """
    logged = _LoggedLosses(problem, log)
    solutions = list(dict.fromkeys(_field(problem, found, logged)))[:count]
    if len(solutions) == 1:
        return found, ()
    losses = logged.at("finalists", lambda: [mean_loss(problem.evaluator, solution) for solution in solutions])
    judged = list(judge(stage, problem.forced, solutions))
    if not all(map(math.isfinite, judged)):
        raise UserError("a finalist's loss is not a number; load the model in float32, check its weights")
    logged.at("judged", lambda: judged)  # and with it the seconds that this took
    finalists = [Finalist(*row) for row in zip(solutions, losses, judged, strict=True)]
    for one in finalists:
        progress(f"finalist {one.solution}: loss {one.loss:.4f}, compensated {one.judged:.4f}")
    ranked = sorted(finalists, key=lambda one: one.judged)
    return with_answer(_so_far(found, logged), problem.forced, ranked[0]), tuple(ranked)


class _LoggedLosses:
    """What was evaluated for the last word, written down: a build that was stopped does not evaluate it again."""

    def __init__(self, problem: Problem, log: Trajectory) -> None:
        self._problem, self._log, self._before = problem, log, problem.evaluator.block_forwards

    def at(self, name: str, found: Callable[[], list[Any]]) -> list[Any]:
        """What an earlier run found there, or else `found()`, as JSON has it."""
        row = self._log.replay()
        if row is None:
            row = {name: found()}
            self._log.append(**row, block_forwards=self._here)
        return list(row[name])

    @property
    def _here(self) -> int:
        return self._log.forwards_before + self._problem.evaluator.block_forwards - self._before

    @property
    def cost(self) -> tuple[float, int]:
        """Seconds and block-forwards of the search and of all this."""
        return (
            self._problem.trajectory.seconds + self._log.seconds_before,
            self._problem.spent + self._log.forwards_before,
        )


def _field(problem: Problem, found: SearchResult, logged: _LoggedLosses) -> Iterator[Solution]:
    yield found.solution
    yield from found.others[:1]
    yield _window(problem, logged)
    yield from found.others[1:]


def _window(problem: Problem, logged: _LoggedLosses) -> Solution:
    """The run of adjacent candidates that costs least; half of those in play leave after each part of the text."""
    free, evaluator = problem.candidates, problem.evaluator
    size = problem.remove - problem.forced.saved
    running = [problem.without(free[at : at + size]) for at in range(len(free) - size + 1)]
    losses: dict[Solution, list[float]] = {solution: [] for solution in running}
    for batch in range(evaluator.batches):

        def look(running: list[Solution] = running, batch: int = batch) -> list[list[float]]:
            return [found.double().mean(1).tolist() for found in evaluator.evaluate(running, batch)]

        for solution, more in zip(running, logged.at("windows", look), strict=True):
            losses[solution] += more
        running = sorted(running, key=lambda solution: fmean(losses[solution]))[: math.ceil(len(running) / 2)]
    return running[0]


def with_answer(found: SearchResult, forced: Solution, best: Finalist) -> SearchResult:
    """`found`, had it found `best`, at the same cost."""
    steps, cost = list(found.trajectory), found.trajectory[-1]
    if best.solution != found.solution:
        removed = tuple(block for block in best.solution.removed if block not in forced.removed)
        pairs = tuple(first for first in best.solution.distilled if first not in forced.distilled)
        steps = [Step(n, block, None, 0, 0) for n, block in enumerate((*removed, *pairs), 1)]
        found = replace(found, removed=(*forced.removed, *removed), distilled=best.solution.distilled)
    steps = [replace(step, seconds=cost.seconds, block_forwards=cost.block_forwards) for step in steps]
    steps[-1] = replace(steps[-1], loss=best.loss)
    return replace(found, trajectory=tuple(steps))


def _so_far(found: SearchResult, logged: _LoggedLosses) -> SearchResult:
    """`found` at the cost of all so far."""
    seconds, spent = logged.cost
    last = replace(found.trajectory[-1], seconds=seconds, block_forwards=spent)
    return replace(found, trajectory=(*found.trajectory[:-1], last))
