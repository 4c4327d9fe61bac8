"""One round of greedy: which block, gone too, costs the least? Asked of as little text and as few blocks as will do.

Three rules keep it cheap; with `z` None none of them holds, and the answer is the argmin, within `TIE`.

Lazy. A candidate's loss increase on the first batch is remembered from the round that measured it last. It is not
measured again while that is surely above (`racing`, paired by token) what the best of this round's first few costs.
This takes for granted that effects do not fall as more blocks go: a heuristic (they mostly grow, but a block that
worked on what a removed one made may lose its use), so the best few are measured anew in every round, and everyone
near them.

Racing. After each batch a candidate leaves that is surely above the leader on the same tokens.

Halving (Karnin et al., 2013). After batch k at most one in 2^(k+1) of all candidates stays, the best, but never fewer
than two. As batches double, each costs about as much as the first at most, whatever the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_deploy.pruning.search.base import Problem, Progress
from pdtrim_deploy.pruning.search.racing import unit_means, units_surely_above

FEW = 4
TIE = 1e-6  # nats a token: float32 sums in another order, on another device, differ by less than this
_LEAST = 2
_STANDS = -1  # the solution as it stands, before this round


@dataclass(frozen=True)
class Losses:
    """Sum and number of token losses, and their unit means (`racing`)."""

    total: float = 0.0
    count: int = 0
    units: tuple[float, ...] = ()

    @classmethod
    def of(cls, losses: Tensor) -> Losses:
        """Of float32 `[sequences, scored]`."""
        return cls(float(losses.double().sum()), losses.numel(), tuple(unit_means(losses).tolist()))

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.total / self.count

    def and_(self, more: Losses) -> Losses:
        """Of both texts."""
        return Losses(self.total + more.total, self.count + more.count, (*self.units, *more.units))

    def minus(self, other: Losses) -> Losses:
        """Differences on the same text."""
        units = tuple(mine - its for mine, its in zip(self.units, other.units, strict=True))
        return Losses(self.total - other.total, self.count, units)

    def surely_above(self, other: Losses, z: float | None) -> bool:
        """On the same text, by more than `z` standard errors of the paired difference."""
        excess = self.minus(other)
        return units_surely_above(excess.mean, torch.tensor(excess.units, dtype=torch.float64), 0, z)


class Race:
    """Of the blocks that may go next, when `removed` are gone.

    Args:
        known: by block, its loss increase on the first batch as last measured; brought up to date.
        z: see `racing`.

    """

    def __init__(
        self,
        problem: Problem,
        removed: tuple[int, ...],
        known: dict[int, Losses],
        z: float | None,
        label: str,
        progress: Progress,
    ) -> None:
        self._problem, self._known, self._z, self._label, self._progress = problem, known, z, label, progress
        left = problem.open_units(removed)
        self._solutions = {block: problem.without((*removed, block)) for block in left}
        self._solutions[_STANDS] = problem.without(removed)
        self._left, self._losses = left, dict.fromkeys(self._solutions, Losses())

    def winner(self) -> int:
        """Of blocks within `TIE` of the best the earliest. Each look is written down: a stopped race goes on there."""
        running = self._enter()
        for batch in range(self._problem.evaluator.batches):
            if batch:
                self._look(running, batch)
            running.sort(key=self._rank(running))
            leader = self._losses[running[0]]
            if self._z is not None:
                running = running[: max(_LEAST, math.ceil(len(self._left) / 2 ** (batch + 1)))]
            running = [block for block in running if not self._losses[block].surely_above(leader, self._z)]
            if len(running) == 1:
                break
        return running[0]

    def _rank(self, blocks: list[int]) -> Callable[[int], tuple[float, int]]:
        """A sorting key: by loss, but all that tie with the best by their place."""
        best = min(self._losses[block].mean for block in blocks)
        means = {block: self._losses[block].mean for block in blocks}
        return lambda block: (best if means[block] <= best + TIE else means[block], block)

    def _enter(self) -> list[int]:
        """Whoever is not surely out by what was known before, measured on the first batch."""
        ranked = sorted((b for b in self._left if b in self._known), key=lambda b: (self._known[b].mean, b))
        few = [block for block in self._left if block not in self._known] + ranked[:FEW]
        self._look([_STANDS, *few], 0)
        best = min((self._increase(block) for block in few), key=lambda increase: increase.mean)
        more = [b for b in ranked[FEW:] if not self._known[b].surely_above(best, self._z)]
        self._look(more, 0)
        self._known |= {block: self._increase(block) for block in (*few, *more)}
        return [*few, *more]

    def _increase(self, block: int) -> Losses:
        return self._losses[block].minus(self._losses[_STANDS])

    def _look(self, blocks: list[int], batch: int) -> None:
        if not blocks:
            return
        problem, log = self._problem, self._problem.trajectory
        row = log.replay()
        if row is None:
            here = f"batch {batch + 1}/{problem.evaluator.batches}"
            self._progress(f"{self._label}: {sum(b >= 0 for b in blocks)} of {len(self._left)} candidates, {here}")
            fresh = problem.evaluator.evaluate([self._solutions[block] for block in blocks], batch)
            losses = [Losses.of(values) for values in fresh]
            row = {"race": [(b, *vars(of_block).values()) for b, of_block in zip(blocks, losses, strict=True)]}
            log.append(**row, block_forwards=problem.spent)
        for block, *more in row["race"]:
            self._losses[block] = self._losses[block].and_(Losses(*more))
