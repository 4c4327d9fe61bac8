"""Neighbours of a solution that lose as many blocks, and as many sublayers of each kind, as it does."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection

from pdtrim_deploy.pruning.search.base import Problem
from pdtrim_deploy.pruning.solution import Solution
from pdtrim_deploy.pruning.units import Kind, kind_of, unit_of

_REDRAWS = 4
_SPREAD = 0.2  # nats: a block that alone costs so much more than another comes up e times less often
_LEAST = 0.02


class Moves:
    """What may change: neither what is forced nor what is protected.

    A pair's blocks belong to the pruning set while the pair is not distilled: every block is in one set at a time.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem, self._weights_of = problem, dict[Kind, dict[int, float]]()
        self._moves: dict[str, Callable[[random.Random, Solution], Solution | None]] = {"swap": self._swap}
        if problem.pairs:
            self._moves |= {"distil": self._distil, "undo": self._undo, "shift": self._shift}

    def draw(self, rng: random.Random, solution: Solution, seen: Collection[Solution]) -> tuple[str, Solution]:
        """A move's name and where it leads; one not `seen` yet, if that is found in a few draws.

        Where nothing can move at all the solution itself comes back, as `stay`.
        """
        drawn = "stay", solution
        for _ in range(_REDRAWS):
            move = rng.choice(list(self._moves))
            neighbour = self._moves[move](rng, solution)
            if neighbour is not None:
                drawn = move, neighbour
                if neighbour not in seen:
                    break
        return drawn

    def _swap(self, rng: random.Random, solution: Solution) -> Solution | None:
        ours = self._removed(solution)
        if not ours:
            return None
        unit = rng.choice(ours)
        return self._with_unit(
            rng, solution, Solution.of({*solution.removed} - {unit}, solution.distilled), kind_of(unit)
        )

    def _undo(self, rng: random.Random, solution: Solution) -> Solution | None:
        ours = self._distilled(solution)
        if not ours:
            return None
        return self._with_unit(
            rng, solution, Solution.of(solution.removed, {*solution.distilled} - {rng.choice(ours)}), "block"
        )

    def _with_unit(self, rng: random.Random, before: Solution, left: Solution, kind: Kind) -> Solution | None:
        """`left` without one unit more: none that was removed `before`."""
        free = [
            unit
            for block in self._problem.candidates
            if block not in left.touched and (unit := unit_of(kind, block)) not in before.removed
        ]
        if not free:
            return None
        weights = self._weights(kind)
        unit = rng.choices(free, [weights[unit] for unit in free])[0]
        return Solution.of((*left.removed, unit), left.distilled)

    def _distil(self, rng: random.Random, solution: Solution) -> Solution | None:
        ours = [unit for unit in self._removed(solution) if kind_of(unit) == "block"]
        if not ours:
            return None
        left = Solution.of({*solution.removed} - {rng.choice(ours)}, solution.distilled)
        free = [first for first in self._problem.pairs if self._fits(first, left)]
        return Solution.of(left.removed, {*left.distilled, rng.choice(free)}) if free else None

    def _shift(self, rng: random.Random, solution: Solution) -> Solution | None:
        ours = self._distilled(solution)
        if not ours:
            return None
        first = rng.choice(ours)
        left = Solution.of(solution.removed, {*solution.distilled} - {first})
        free = [to for to in (first - 1, first + 1) if self._fits(to, left)]
        return Solution.of(left.removed, {*left.distilled, rng.choice(free)}) if free else None

    def _fits(self, first: int, solution: Solution) -> bool:
        return self._problem.may_distil(first) and not {first, first + 1} & solution.touched

    def _removed(self, solution: Solution) -> list[int]:
        return [unit for unit in solution.removed if unit not in self._problem.forced.removed]

    def _distilled(self, solution: Solution) -> list[int]:
        return [first for first in solution.distilled if first not in self._problem.forced.distilled]

    def _weights(self, kind: Kind) -> dict[int, float]:
        """How often a unit comes up."""
        if kind not in self._weights_of:
            self._weights_of[kind] = self._measured(kind)
        return self._weights_of[kind]

    def _measured(self, kind: Kind) -> dict[int, float]:
        """By the loss on the first batch of removing a unit alone (greedy knows it already)."""
        evaluator = self._problem.evaluator
        candidates = [unit_of(kind, block) for block in self._problem.candidates]
        evaluator.settle(self._problem.forced)
        alone = evaluator.screen([self._problem.without((block,)) for block in candidates], 0)
        means = [float(losses.double().mean()) for losses in alone]
        least = min(means)
        return {
            block: max(_LEAST, math.exp(-(mean - least) / _SPREAD))
            for block, mean in zip(candidates, means, strict=True)
        }
