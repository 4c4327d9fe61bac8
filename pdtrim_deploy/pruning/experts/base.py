"""What a criterion sees of a block's experts, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertUse:
    """What a stage's tokens did with the experts of one block.

    Attributes:
        tokens: int64 `[experts]`: tokens that were sent to each.
        weighted_norms: float64 `[experts]`: sum over these of router weight x L2 norm of the expert's output.

    """

    tokens: Tensor
    weighted_norms: Tensor

    @classmethod
    def none(cls, experts: int) -> ExpertUse:
        """Of no token."""
        return cls(torch.zeros(experts, dtype=torch.int64), torch.zeros(experts, dtype=torch.float64))

    def __add__(self, other: ExpertUse) -> ExpertUse:
        return ExpertUse(self.tokens + other.tokens, self.weighted_norms + other.weighted_norms)


class Criterion(Protocol):
    """Ranks the experts of one block.

    Attributes:
        reads_text: whether it needs `use`; where not, no model is run.

    """

    reads_text: bool

    def scores(self, use: ExpertUse, generator: torch.Generator) -> Tensor:
        """float64 `[experts]`: the larger, the rather the expert is kept. `generator` is the block's own."""
        ...
