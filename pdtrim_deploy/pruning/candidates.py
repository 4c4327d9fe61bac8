"""What may go: every block in the pruning set or, with a neighbour, in the distillation set (PDTrim)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.pruning.redundancy import similarity

THRESHOLD = 0.95


@dataclass(frozen=True)
class Candidates:
    """Of a dense model, on calibration text.

    Attributes:
        redundancy: cos(x_i, x_{i+1}) of each block.
        pair_redundancy: cos(x_i, x_{i+2}) of each adjacent pair, by its first block: one fewer.
        threshold: a pair above it may be distilled.
        distillation: first blocks of the distillation set's pairs, which do not overlap, ascending.
        pruning: all other blocks, the most redundant first.

    """

    redundancy: tuple[float, ...]
    pair_redundancy: tuple[float, ...]
    threshold: float
    distillation: tuple[int, ...]
    pruning: tuple[int, ...]

    @classmethod
    def of(cls, redundancy: list[float], pair_redundancy: list[float], threshold: float = THRESHOLD) -> Candidates:
        """Pairs are taken by falling cosine, each that does not overlap those before; ties go to the earlier."""
        taken, pairs = set[int](), list[int]()
        for first in sorted(range(len(pair_redundancy)), key=lambda first: (-pair_redundancy[first], first)):
            if pair_redundancy[first] > threshold and not {first, first + 1} & taken:
                taken |= {first, first + 1}
                pairs.append(first)
        rest = (block for block in range(len(redundancy)) if block not in taken)
        pruning = tuple(sorted(rest, key=lambda block: (-redundancy[block], block)))
        return cls(tuple(redundancy), tuple(pair_redundancy), threshold, tuple(sorted(pairs)), pruning)

    def set_of(self, block: int) -> str:
        """`prune`, or `distil` with the pair."""
        for first in self.distillation:
            if block in (first, first + 1):
                return f"distil {first}+{first + 1}"
        return "prune"


def find(
    model: CausalLM, ids: Tensor, threshold: float = THRESHOLD, progress: Callable[[str], None] = lambda _: None
) -> Candidates:
    """Measured in one pass over `ids`, int64 `[S, T]`."""
    spans = (1, 2) if len(model.model.layers) > 1 else (1,)
    cosines = similarity(model, ids, spans, progress=progress)
    return Candidates.of(cosines[1].tolist(), cosines[2].tolist() if 2 in cosines else [], threshold)
