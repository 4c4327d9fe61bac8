"""Whether a compensation helps on text that it was not fitted to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.compensation.base import Compensation
from pdtrim_deploy.pruning.pair import StagePair
from pdtrim_deploy.pruning.pd_loss import pd_loss, prefill_loss


@dataclass(frozen=True)
class HeldOut:
    """Loss without and with it, nats a token: each half of the text by what the other half fitted."""

    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether it helps."""
        return self.after < self.before


def halves(sequences: int) -> tuple[slice, slice]:
    """Of so many sequences, the first half and the others.

    Corpora of a mixture take turns, so both halves hold their shares. Every second sequence would not: of two corpora
    each half would be one.
    """
    middle = (sequences + 1) // 2
    return slice(0, middle), slice(middle, sequences)


def held_out(method: Compensation, pair: StagePair, stage: Stage, ids: Tensor) -> HeldOut:
    """Of `stage` of `pair`, whose prefill is as it will be when `stage` is decode; `ids` int64 `[S >= 2, T]`."""
    loss, before, after = prefill_loss if stage == "prefill" else pd_loss, 0.0, 0.0
    first, second = (ids[half] for half in halves(len(ids)))
    for fitted, checked in ((first, second), (second, first)):
        before += loss(pair, checked) * len(checked)
        after += loss(method.compensate(pair, stage, fitted, lambda _: None), checked) * len(checked)
    return HeldOut(before / len(ids), after / len(ids))
