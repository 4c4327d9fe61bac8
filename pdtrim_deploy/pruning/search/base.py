"""What a search is asked and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic
from typing import Protocol

from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.pruning.evaluator import Evaluator, InProcess
from pdtrim_deploy.pruning.objective import Objective
from pdtrim_deploy.pruning.search.trajectory import Trajectory
from pdtrim_deploy.pruning.solution import NOTHING, Solution
from pdtrim_deploy.pruning.units import KINDS, Counts, Kind, block_of, check_blocks, unit_of

Progress = Callable[[str], None]
NO_SUBLAYERS = Counts()


@dataclass(frozen=True)
class Settings:
    """What some methods take.

    Attributes:
        seed: of what is drawn; equal seeds give equal answers.
        steps: proposals of an annealed search.
        minutes: an annealed search ends earlier when so much time has passed (the answer then depends on the machine).
        racing: candidates leave early (`racing`); otherwise each is measured on all of the text.

    """

    seed: int = 0
    steps: int = 150
    minutes: float | None = field(default=None, repr=False)  # says only where the search ends
    racing: bool = True


DEFAULTS = Settings()


@dataclass(frozen=True)
class Problem:
    """Which blocks can go?

    Attributes:
        model, ids: the dense model and calibration text, int64 `[S, T]`.
        objective: the loss to keep low, on the same model.
        remove: blocks saved in the end, `forced` among them.
        sublayers: attentions and MLPs saved besides, of blocks that stay; `forced` among them.
        forced: what is lost from the start (what prefill lost, when decode is searched).
        protected: blocks that must stay.
        pairs: first blocks of the distillation set's pairs: may be distilled, each or one block beside it.
        trajectory: where each step is written down, and read from when the search was stopped.
        evaluator: answers what solutions lose; by default this process, one after another.

    Raises:
        UserError: more is to go than may go.

    """

    model: CausalLM
    ids: Tensor
    objective: Objective
    remove: int
    forced: Solution = NOTHING
    protected: frozenset[int] = frozenset()
    pairs: tuple[int, ...] = ()
    trajectory: Trajectory = field(default_factory=Trajectory)
    evaluator: Evaluator = None  # type: ignore[assignment]
    sublayers: Counts = NO_SUBLAYERS

    def __post_init__(self) -> None:
        if self.evaluator is None:
            object.__setattr__(self, "evaluator", InProcess(self.objective))
        blocks, gone = self.objective.blocks, self.forced.counts.blocks
        if self.remove >= blocks:
            raise UserError(f"cannot remove {self.remove} of {blocks} blocks; remove at most {blocks - 1}")
        if self.remove < gone:
            raise UserError(
                f"cannot remove {self.remove} blocks when {gone} are gone already; "
                f"decode loses at least as many blocks as prefill"
            )
        if self.remove - gone > len(self.candidates):
            raise UserError(
                f"cannot remove {self.remove} of {blocks} blocks with {len(self.protected)} protected; "
                f"remove at most {gone + len(self.candidates)}"
            )
        if not self.sublayers.total:
            return
        check_blocks(blocks)
        for kind in KINDS[1:]:
            if self.counts.of(kind) < self.forced.counts.of(kind):
                raise UserError(f"decode loses fewer {kind}s than prefill; it loses at least as many")
        if self.left(()).total > len(self.candidates):
            raise UserError(
                f"cannot remove {self.left(())} more where {len(self.candidates)} of {blocks} blocks are whole and not "
                "protected; each gives one of these"
            )

    @cached_property
    def candidates(self) -> tuple[int, ...]:
        """Blocks that may still go."""
        kept_out = self.protected | self.forced.touched
        return tuple(block for block in range(self.objective.blocks) if block not in kept_out)

    @property
    def counts(self) -> Counts:
        """What is saved in the end, `forced` among it."""
        return self.sublayers._replace(blocks=self.remove)

    def left(self, removed: tuple[int, ...]) -> Counts:
        """What is still to go when `forced` and `removed` are gone."""
        gone = self.without(removed).counts
        return Counts(*(total - lost for total, lost in zip(self.counts, gone, strict=True)))

    def open_units(self, removed: tuple[int, ...]) -> list[int]:
        """What may go next: all of one kind, blocks before sublayers."""
        left = self.left(removed)
        kind: Kind = next(kind for kind in KINDS if left.of(kind))
        touched = set(map(block_of, removed))
        return [unit_of(kind, block) for block in self.candidates if block not in touched]

    @property
    def spent(self) -> int:
        """Block-forwards so far, those of an earlier run and of getting the objective ready among them."""
        return self.trajectory.forwards_before + self.evaluator.block_forwards

    def may_distil(self, first: int) -> bool:
        """Whether blocks `first` and `first + 1` may become one."""
        return {first, first + 1} <= set(self.candidates)

    def without(self, units: tuple[int, ...]) -> Solution:
        """What is forced, and those units removed too."""
        return Solution.of((*self.forced.removed, *units), self.forced.distilled)


@dataclass(frozen=True)
class Step:
    """One unit's removal: the loss after it (nats per token; None where the method measures none), the cost so far.

    `seconds` is wall time and `block_forwards` counts blocks run times sequences, both since the search began.
    """

    step: int
    block: int
    loss: float | None
    seconds: float
    block_forwards: int


@dataclass(frozen=True)
class Cost:
    """Wall time in seconds, and blocks run times sequences."""

    seconds: float = 0.0
    block_forwards: int = 0

    def __add__(self, other: Cost) -> Cost:
        """Both."""
        return Cost(self.seconds + other.seconds, self.block_forwards + other.block_forwards)


NO_COST = Cost()


@dataclass(frozen=True)
class SearchResult:
    """What goes, the forced first and then in order of removal, and one `Step` for each block that the search saved.

    `others` are whole solutions that it took on its way: where it began, then the best of the rest, best first.
    """

    removed: tuple[int, ...]
    trajectory: tuple[Step, ...]
    distilled: tuple[int, ...] = ()
    others: tuple[Solution, ...] = ()

    @property
    def solution(self) -> Solution:
        """The same in order of blocks."""
        return Solution.of(self.removed, self.distilled)

    @property
    def loss(self) -> float | None:
        """Calibration loss of the whole solution, if the method measured it."""
        return self.trajectory[-1].loss if self.trajectory else None

    @property
    def cost(self) -> Cost:
        """Of the whole search."""
        return Cost(self.trajectory[-1].seconds, self.trajectory[-1].block_forwards) if self.trajectory else NO_COST


def time_left(began: float, done: int, left: int) -> str:
    """At the pace since `began` (monotonic), in which `done` parts of the work were done."""
    return f"{(monotonic() - began) / max(1, done) * left / 60:.1f} min left"


class Search(Protocol):
    """A method; equal problems give equal answers, and one that was stopped goes on by its trajectory.

    Its `repr` says all that its answer depends on besides the problem: a search under another one begins anew.
    """

    def run(self, problem: Problem, progress: Progress) -> SearchResult:
        """Save `problem.remove` blocks."""
        ...
