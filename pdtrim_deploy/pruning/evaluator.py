"""Losses of many solutions, none computed twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.hidden_states import HiddenStates, Route
from pdtrim_deploy.pruning.objective import Objective
from pdtrim_deploy.pruning.solution import Solution
from pdtrim_deploy.pruning.vocabulary_sample import VocabularySample

MEMORY = 1 << 30


class Evaluator(Protocol):
    """What a search asks. Answers depend on the arguments alone: any number of workers gives the same.

    Attributes:
        blocks: of the dense model.
        batches: parts of the calibration text, small ones first.
        workers: how many solutions are evaluated at a time; searches hand over as many at once where they can.
        block_forwards: cost so far: blocks run, times sequences; over all workers.

    """

    blocks: int
    batches: int
    workers: int

    @property
    def block_forwards(self) -> int:
        """Blocks run, times sequences, so far."""
        ...

    def evaluate(self, solutions: Sequence[Solution], batch: int) -> list[Tensor]:
        """For each solution float32 `[sequences, scored]` on the host: losses on one batch; UserError: not a number."""
        ...

    def screen(self, solutions: Sequence[Solution], batch: int) -> list[Tensor]:
        """The same by a sample of the vocabulary, where the objective has one: to be compared with each other alone."""
        ...

    def settle(self, solution: Solution) -> None:
        """A hint: the solutions to come are its neighbours."""
        ...


class InProcess:
    """One after another on this process's model, with hidden states kept and losses remembered.

    Args:
        memory: bytes of hidden states in memory at most, not counting those that run at the moment.
        disk: bytes of others in mapped files in `folder` (by default the system's temporary one), at most.
        progress: hears how far the solutions of a call are.

    """

    workers = 1

    def __init__(
        self,
        objective: Objective,
        memory: int = MEMORY,
        disk: int = 0,
        folder: Path | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._progress = progress
        self.objective, self.blocks, self.batches = objective, objective.blocks, objective.batches
        self._states = HiddenStates(objective, memory, disk, folder)
        self._known = dict[tuple[Route, int, bool], Tensor]()
        self._samples = dict[int, VocabularySample | None]()
        self._screened = dict[tuple[Route, int], Tensor]()  # last states, of which exact losses may be wanted soon

    @property
    def block_forwards(self) -> int:
        """Blocks run, times sequences, so far."""
        return self.objective.block_forwards

    def evaluate(self, solutions: Sequence[Solution], batch: int) -> list[Tensor]:
        """Losses on one batch; UserError when one is not a number."""
        return self._losses(solutions, batch, screened=False)

    def screen(self, solutions: Sequence[Solution], batch: int) -> list[Tensor]:
        """About these losses, for less; UserError when one is not a number."""
        routes = {solution.route(self.blocks) for solution in solutions}
        if batch:  # who is not here any more has lost
            self._screened = {key: hidden for key, hidden in self._screened.items() if key[0] in routes}
        return self._losses(solutions, batch, screened=True)

    def _losses(self, solutions: Sequence[Solution], batch: int, screened: bool) -> list[Tensor]:
        routes = [solution.route(self.blocks) for solution in solutions]
        fresh = list(dict.fromkeys(route for route in routes if (route, batch, screened) not in self._known))
        start = self.objective.forced.route(self.blocks)
        first = [start] if screened and fresh and batch not in self._samples else []  # in the same pass over the blocks
        run = [*first, *(route for route in fresh if (route, batch) not in self._screened)]
        states = dict(zip(run, self._states.final_states(run, batch, self._progress), strict=True))
        for route in first:
            self._samples[batch] = self.objective.sample(batch, states[route])
        sample = self._samples.get(batch) if screened else None
        if sample is not None:
            self._screened |= {(route, batch): states[route] for route in fresh if route in states}
        for route in fresh:
            hidden = states[route] if route in states else self._screened[route, batch]
            losses = self.objective.losses(batch, hidden, sample).cpu()
            if not bool(torch.isfinite(losses).all()):
                raise UserError("the calibration loss is not a number; load the model in float32, check its weights")
            self._known[route, batch, screened] = losses
            if screened and sample is None:
                self._known[route, batch, False] = losses
        return [self._known[route, batch, screened] for route in routes]

    def settle(self, solution: Solution) -> None:
        """Keep this solution's hidden states before all others."""
        self._screened.clear()
        self._states.settle(solution.route(self.blocks))


def mean_loss(evaluator: Evaluator, solution: Solution) -> float:
    """Nats a token over all batches."""
    parts = [evaluator.evaluate([solution], batch)[0] for batch in range(evaluator.batches)]
    return float(torch.cat(parts).double().mean())
