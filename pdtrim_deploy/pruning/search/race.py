"""One round of greedy: which block, gone too, costs the least? Little text and few blocks answer that.

Rules keep a round cheap; with `z` None none of them holds, and the answer is the argmin, within `TIE`.

Forecast. By block and batch the loss increase is remembered from the round that measured it last. As soon as a block is
measured again on a batch, what is remembered of the other batches moves by as much as this batch did on average.
Blocks are compared by these forecasts, on the batches that both have: so a look at little text ranks blocks as if they
had been measured on all that earlier rounds measured. What is measured replaces its forecast.

Lazy. The best few by forecast are measured on the first batch, then all others that are not surely above the best of
these (`racing`, paired by token). This takes for granted that effects do not fall as more blocks go: a heuristic (they
mostly grow, but a block that worked on what a removed block wrote may lose its use).

Racing. After each batch a candidate leaves that is surely above the leader on the same tokens.

Sampling. These looks take losses by a sample of the vocabulary (`vocabulary_sample`), where the objective has one; the
exact losses of the best two on all of the text decide.

Halving (Karnin et al., 2013). After batch k at most one in 2^(k+1) of all candidates stays, the best, but never fewer
than two. As batches double, each costs about as much as the first at most, whatever the noise. To halve once more those
that earlier rounds measured on all text was tried: it lost the best block in one round of SmolLM2-135M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

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
        units = tuple(loss - other_loss for loss, other_loss in zip(self.units, other.units, strict=True))
        return Losses(self.total - other.total, self.count, units)

    def moved(self, nats: float) -> Losses:
        """Each token's loss higher by `nats`."""
        return Losses(self.total + nats * self.count, self.count, tuple(unit + nats for unit in self.units))

    def surely_above(self, z: float | None) -> bool:
        """Whether these differences are above 0 by more than `z` standard errors of their mean."""
        return units_surely_above(self.mean, torch.tensor(self.units, dtype=torch.float64), 0, z)


ByBatch: TypeAlias = dict[int, Losses]


class Race:
    """Of the blocks that may go next, when `removed` are gone.

    Args:
        known: by block and batch its loss increase as last measured or forecast; brought up to date.
        z: see `racing`.

    """

    def __init__(
        self,
        problem: Problem,
        removed: tuple[int, ...],
        known: dict[int, ByBatch],
        z: float | None,
        label: str,
        progress: Progress,
    ) -> None:
        self._problem, self._known, self._z, self._label, self._progress = problem, known, z, label, progress
        self._left = problem.open_units(removed)
        self._solutions = {block: problem.without((*removed, block)) for block in self._left}
        self._solutions[_STANDS] = problem.without(removed)
        self._losses: dict[int, ByBatch] = {block: {} for block in self._solutions}

    def winner(self) -> int:
        """Of blocks within `TIE` of the best the earliest. Each look is written down: a stopped race goes on there."""
        running = self._enter()
        for batch in range(self._problem.evaluator.batches):
            if batch:
                self._look([_STANDS, *running], batch)
            running = self._ranked(running)
            if self._z is not None:
                running = running[: max(_LEAST, math.ceil(len(self._left) / 2 ** (batch + 1)))]
            running = [block for block in running if not self._excess(block, running[0]).surely_above(self._z)]
            if len(running) == 1:
                break
        self._known |= {block: self._forecast(block) for block in self._left if self._losses[block]}
        return self._best_of(running[:_LEAST]) if self._z is not None and len(running) > 1 else running[0]

    def _best_of(self, blocks: list[int]) -> int:
        """By exact losses on all of the text."""
        for batch in range(self._problem.evaluator.batches):
            self._look(blocks, batch, exact=True)
        return self._ranked(blocks)[0]

    def _ranked(self, blocks: list[int]) -> list[int]:
        """By loss, but all that tie with the best by their place."""
        if not blocks:
            return []
        widest = min(blocks, key=lambda block: (-_joined(self._forecast(block)).count, block))
        excess = {block: self._excess(block, widest).mean for block in blocks}
        tied = min(excess.values()) + TIE
        return sorted(blocks, key=lambda block: (max(excess[block], tied), block))

    def _enter(self) -> list[int]:
        """Blocks measured on the first batch: unknown ones, the best few, and those that may be better than they."""
        ranked = self._ranked([block for block in self._left if block in self._known])
        few = [block for block in self._left if block not in self._known] + ranked[:FEW]
        self._look([_STANDS, *few], 0)
        best = self._ranked(few)[0]
        more = [block for block in ranked[FEW:] if not self._excess(block, best).surely_above(self._z)]
        self._look(more, 0)
        return [*few, *more]

    def _excess(self, block: int, other: int) -> Losses:
        """Forecast increase above the other's, on the batches of which both have any."""
        ours, others = self._forecast(block), self._forecast(other)
        both = ours.keys() & others.keys()
        return _joined({batch: ours[batch].minus(others[batch]) for batch in both})

    def _forecast(self, block: int) -> ByBatch:
        """By batch the increase that was measured in this round, or that of an earlier one, moved as those were."""
        measured = {batch: losses.minus(self._losses[_STANDS][batch]) for batch, losses in self._losses[block].items()}
        known = self._known.get(block, {})
        both = measured.keys() & known.keys()
        moved = _joined({batch: measured[batch].minus(known[batch]) for batch in both})
        return {batch: losses.moved(moved.mean if both else 0.0) for batch, losses in known.items()} | measured

    def _look(self, blocks: list[int], batch: int, exact: bool = False) -> None:
        if not blocks:
            return
        problem, log = self._problem, self._problem.trajectory
        row = log.replay()
        if row is None:
            here = f"batch {batch + 1}/{problem.evaluator.batches}"
            self._progress(f"{self._label}: {sum(b >= 0 for b in blocks)} of {len(self._left)} candidates, {here}")
            exact = exact or self._z is None
            losses_of = problem.evaluator.evaluate if exact else problem.evaluator.screen
            fresh = losses_of([self._solutions[block] for block in blocks], batch)
            losses = [Losses.of(values) for values in fresh]
            row = {"race": [(b, *vars(of_block).values()) for b, of_block in zip(blocks, losses, strict=True)]}
            log.append(**row, block_forwards=problem.spent)
        for block, *values in row["race"]:
            self._losses[block][batch] = Losses(*values)


def _joined(parts: ByBatch) -> Losses:
    """Of the text of all batches."""
    return reduce(Losses.and_, (parts[batch] for batch in sorted(parts)), Losses())
