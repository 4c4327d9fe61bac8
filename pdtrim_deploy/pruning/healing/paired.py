"""Whether training helped: a paired test on calibration text that no gradient and no choice of a rate saw.

Least squares, KV-only fits and finalists may have read it before: both weights compared have had that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pdtrim_deploy.local.student_t import t_975


@dataclass(frozen=True)
class PairedTest:
    """KL divergence from the dense model, in nats a token: means over `sequences` held-out sequences.

    Attributes:
        before, after: of the unhealed and of the healed stage.
        difference: mean over sequences of after minus before; `stderr` is its standard error.

    """

    before: float
    after: float
    difference: float
    stderr: float
    sequences: int

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> PairedTest:
        """From the divergences of the same sequences, each float64 `[S >= 2]`."""
        change = after - before
        stderr = float(change.std()) / math.sqrt(len(change))
        return cls(float(before.mean()), float(after.mean()), float(change.mean()), stderr, len(change))

    @property
    def kept(self) -> bool:
        """Whether the 95% interval of the difference (Student's t) lies below 0."""
        return self.difference + t_975(self.sequences - 1) * self.stderr < 0

    @property
    def report(self) -> dict[str, Any]:
        """As JSON."""
        return vars(self) | {"kept": self.kept}


@dataclass(frozen=True)
class Split:
    """Calibration text by use, each int64 `[sequences, length]`: no sequence has two.

    Attributes:
        fit: what weights are trained on.
        chosen: what learning rates are compared on.
        judged: what decides whether the healed weights are kept.

    """

    fit: Tensor
    chosen: Tensor
    judged: Tensor

    @classmethod
    def of(cls, ids: Tensor, chooses: bool) -> Split:
        """The last eighth judges, or 8 sequences where these are no more than a quarter; half as many choose.

        Text of 4 sequences or more.
        """
        judged = min(max(8, len(ids) // 8), max(2, len(ids) // 4))
        chosen = judged // 2 if chooses else 0
        fit, rest = torch.split(ids, [len(ids) - judged - chosen, judged + chosen])
        return cls(fit, rest[:chosen], rest[chosen:])
