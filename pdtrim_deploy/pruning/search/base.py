"""What a search is asked and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pdtrim_deploy.blockwise import CausalLM
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.objective import Objective

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Problem:
    """Which blocks can go?

    Attributes:
        model, ids: the dense model and calibration text, int64 `[S, T]`.
        objective: the loss to keep low, on the same model.
        remove: blocks gone in the end, `forced` among them.
        forced: blocks gone from the start (those that prefill lost, when decode is searched).
        protected: blocks that must stay.

    Raises:
        UserError: more is to go than may go.

    """

    model: CausalLM
    ids: Tensor
    objective: Objective
    remove: int
    forced: tuple[int, ...] = ()
    protected: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        blocks = self.objective.blocks
        if self.remove >= blocks:
            raise UserError(f"cannot remove {self.remove} of {blocks} blocks; remove at most {blocks - 1}")
        if self.remove < len(self.forced):
            raise UserError(
                f"cannot remove {self.remove} blocks when {len(self.forced)} are gone already; "
                f"decode loses at least as many blocks as prefill"
            )
        if self.remove - len(self.forced) > len(self.candidates):
            raise UserError(
                f"cannot remove {self.remove} of {blocks} blocks with {len(self.protected)} protected; "
                f"remove at most {len(self.forced) + len(self.candidates)}"
            )

    @property
    def candidates(self) -> tuple[int, ...]:
        """Blocks that may still go."""
        kept_out = self.protected | set(self.forced)
        return tuple(block for block in range(self.objective.blocks) if block not in kept_out)


@dataclass(frozen=True)
class Step:
    """One removal: the loss after it (nats per token; None where the method measures none) and the cost so far.

    `seconds` is wall time and `block_forwards` counts blocks run times sequences, both since the search began.
    """

    step: int
    block: int
    loss: float | None
    seconds: float
    block_forwards: int


@dataclass(frozen=True)
class SearchResult:
    """Blocks in order of removal, the forced ones first, and one `Step` for each block the search removed."""

    removed: tuple[int, ...]
    trajectory: tuple[Step, ...]


class Search(Protocol):
    """A method; equal problems give equal answers."""

    def run(self, problem: Problem, progress: Progress) -> SearchResult:
        """Choose `problem.remove` blocks."""
        ...
