"""What a compensation is asked and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.recipe.healing import HealingSection

Progress = Callable[[str], None]


@dataclass(frozen=True)
class FitRules:
    """How least squares fit.

    Attributes:
        falls_back: with fewer than ten tokens a feature they change a map by a diagonal and a low rank alone.
        prompt_share: what a prompt position, read by decode as a whole model reads it, counts in decode's fit.
        sequences: of the text that a build fits, which decides on the fall-back: a judge that fits a part of it falls
            back where the build does. None: the text at hand decides.

    """

    falls_back: bool = False
    prompt_share: float = 0.0
    sequences: int | None = None

    @classmethod
    def of(cls, section: HealingSection) -> FitRules:
        """As a recipe has them."""
        falls_back = section.fit == "auto"
        return cls(falls_back, section.prompt_share, section.fitted if falls_back else None)


WHOLE_MAPS = FitRules()


class Compensation(Protocol):
    """Makes up, in the weights, for blocks that were dropped. Equal text gives equal weights.

    It may change what a block adds to its hidden state (o_proj, down_proj) and nothing that makes K or V. So a block's
    map from hidden state to K and V stays the dense model's in both stages, and the KV that travels changes only as
    prefill's own hidden states do: towards the dense model's.
    """

    def compensate(self, pair: StagePair, stage: Stage, ids: Tensor, progress: Progress) -> StagePair:
        """`pair` with `stage` compensated on text `ids`, int64 `[S, T]`.

        Decode reads the KV that `pair`'s prefill makes of the first half of each sequence: compensate prefill first.
        """
        ...

    def compensate_all(
        self, pairs: Sequence[StagePair], stage: Stage, ids: Tensor, progress: Progress
    ) -> list[StagePair]:
        """Each of `pairs`, as by `compensate`; what they have in common is run once. For decode that is prefill too."""
        ...
