"""Simulated annealing over removed blocks and distilled pairs, from the greedy solution (PDTrim; constants are ours).

A step draws one neighbour s' of the solution s: `swap` a removed block for another, exchange a removed block for a
distilled pair (`distil`) or the other way round (`undo`), or `shift` a pair by one block. It is taken when
f(s') - f(s) < -T ln u with u uniform in (0, 1], and T falls geometrically from 0.02 to 0.0005 nats a token. As u is
drawn first, the bound is known before anything is run, and a neighbour that is surely above it on the first parts of
the calibration text is dropped there. A step's draws depend on seed and step alone: a stopped search goes on as if
nothing had been, and steps may be evaluated ahead, several at a time, without changing the chain.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from pdtrim_deploy.pruning.evaluator import Evaluator
from pdtrim_deploy.pruning.search.base import Problem, Progress, SearchResult, Settings, Step
from pdtrim_deploy.pruning.search.greedy import Greedy
from pdtrim_deploy.pruning.search.moves import Moves
from pdtrim_deploy.pruning.search.racing import surely_above
from pdtrim_deploy.pruning.solution import Solution


@dataclass(frozen=True)
class _Proposal:
    step: int
    move: str
    solution: Solution
    bound: float


@dataclass(frozen=True)
class _Judged:
    excess: float
    sequences: int
    accepted: bool


@dataclass(frozen=True)
class Anneal:
    """Annealing, with the best solution seen as the answer.

    Attributes:
        hot, cold: first and last temperature, nats a token.
        race_z: a neighbour is dropped early when the mean paired difference to the current solution exceeds its bound
            by more than so many standard errors (see `racing`): at 2, a good one wrongly with probability 0.023. The
            greedy start races by it too: what it misses by a hair, annealing finds.

    """

    settings: Settings
    hot: float = 0.02
    cold: float = 0.0005
    race_z: float | None = 2.0

    def run(self, problem: Problem, progress: Progress) -> SearchResult:
        """Greedy, then `settings.steps` steps, or fewer when `settings.minutes` are over."""
        log, steps = problem.trajectory, self.settings.steps
        start = Greedy(self.race_z).run(problem, progress)
        if start.loss is None:
            return start
        moves = Moves(problem)
        state, began = _State(start.solution, start.loss), monotonic()
        while state.step < steps:
            row = log.replay()
            if row is not None:
                state.follow(row)
                continue
            if self.settings.minutes is not None and log.seconds > 60 * self.settings.minutes:
                progress(f"anneal: {self.settings.minutes:g} minutes are over after {state.step} of {steps} steps")
                break
            proposals = self._propose(moves, state, min(problem.evaluator.workers, steps - state.step))
            problem.evaluator.settle(state.solution)
            judgements = self._judge(problem.evaluator, state, proposals)
            for proposal, judged in zip(proposals, judgements, strict=True):
                row = _row(proposal, judged, state.loss) | {"block_forwards": problem.spent}
                log.append(**row)
                state.follow(row)
                if judged.accepted:
                    break
            left = (monotonic() - began) / state.here * (steps - state.step)
            if self.settings.minutes is not None:
                left = max(0, min(left, 60 * self.settings.minutes - log.seconds))
            progress(
                f"anneal {state.step}/{steps}: loss {state.loss:.4f}, best {state.best_loss:.4f}, "
                f"{left / 60:.1f} min left"
            )
        return _result(problem, state)

    def _propose(self, moves: Moves, state: _State, count: int) -> list[_Proposal]:
        """For the next `count` steps, as they will be if all before them are turned down."""
        proposals, seen = list[_Proposal](), set(state.seen)
        for step in range(state.step, state.step + count):
            rng = random.Random(f"{self.settings.seed}/{step}")
            move, solution = moves.draw(rng, state.solution, seen)
            heat = self.hot * (self.cold / self.hot) ** (step / max(1, self.settings.steps - 1))
            proposals.append(_Proposal(step, move, solution, -heat * math.log(1 - rng.random())))
            seen.add(solution)
        return proposals

    def _judge(self, evaluator: Evaluator, state: _State, proposals: list[_Proposal]) -> list[_Judged]:
        excess = [torch.empty(0, 0)] * len(proposals)
        running = list(range(len(proposals)))
        for batch in range(evaluator.batches):
            now = evaluator.evaluate([state.solution], batch)[0]
            neighbours = evaluator.evaluate([proposals[at].solution for at in running], batch)
            for at, losses in zip(running, neighbours, strict=True):
                excess[at] = torch.cat((excess[at], losses - now)) if batch else losses - now
            running = [at for at in running if not surely_above(excess[at], proposals[at].bound, self.race_z)]
        return [
            _judged(values, at in running, proposal.bound)
            for at, (values, proposal) in enumerate(zip(excess, proposals, strict=True))
        ]


def search(settings: Settings) -> Anneal:
    """As a recipe asks for it."""
    return Anneal(settings) if settings.racing else Anneal(settings, race_z=None)


class _State:
    """Where the chain is; follows rows of the trajectory, whether just made or read."""

    def __init__(self, solution: Solution, loss: float) -> None:
        self.solution, self.loss, self.step, self.here = solution, loss, 0, 0
        self.best, self.best_loss, self.last = solution, loss, dict[str, Any]()
        self.seen, self.taken = {solution}, {solution: loss}

    def follow(self, row: dict[str, Any]) -> None:
        self.step, self.last = row["step"] + 1, row
        self.here += "seconds" not in row  # read rows have them
        solution = Solution.of(row["removed"], row["distilled"])
        self.seen.add(solution)
        if row["accepted"]:
            self.solution, self.loss = solution, row["loss"]
            self.taken.setdefault(solution, self.loss)
            if self.loss < self.best_loss:
                self.best, self.best_loss = self.solution, self.loss


def _judged(excess: Tensor, whole: bool, bound: float) -> _Judged:
    mean = float(excess.double().mean())
    return _Judged(mean, len(excess), whole and mean < bound)


def _row(proposal: _Proposal, judged: _Judged, loss: float) -> dict[str, Any]:
    """`loss` is the neighbour's where it was run on everything, else what its first sequences let expect."""
    return {
        "step": proposal.step,
        "move": proposal.move,
        "removed": proposal.solution.removed,
        "distilled": proposal.solution.distilled,
        "loss": loss + judged.excess,
        "sequences": judged.sequences,
        "accepted": judged.accepted,
    }


def _result(problem: Problem, state: _State) -> SearchResult:
    forced = problem.forced
    removed = [block for block in state.best.removed if block not in forced.removed]
    pairs = [first for first in state.best.distilled if first not in forced.distilled]
    seconds, spent = problem.trajectory.seconds, problem.spent
    steps = [Step(n, block, None, seconds, spent) for n, block in enumerate((*removed, *pairs), 1)]
    steps[-1] = Step(len(steps), steps[-1].block, state.best_loss, seconds, spent)
    start, *rest = state.taken
    others = (start, *sorted(rest, key=state.taken.__getitem__))
    return SearchResult((*forced.removed, *removed), tuple(steps), state.best.distilled, others)
