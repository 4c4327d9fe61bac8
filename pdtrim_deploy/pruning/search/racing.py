"""Candidates compared on growing parts of the calibration text: who surely loses runs no further.

Losses of one text differ far more from token to token than from candidate to candidate, so differences are paired by
token. Neighbouring tokens' differences are alike; their means over units of 32 tokens are taken as independent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_UNIT_TOKENS = 32
_LEAST_UNITS = 8


def unit_means(losses: Tensor) -> Tensor:
    """float64 `[units]` of losses `[sequences, scored]`; all that a race needs to know of them, beside their mean."""
    return torch.cat([part.double().mean(1) for part in losses.split(_UNIT_TOKENS, dim=1)])


def surely_above(excess: Tensor, bound: float, z: float | None) -> bool:
    """Is the mean of paired differences `[sequences, scored]` above `bound` by more than `z` of its standard errors?

    Never with fewer than 8 units, nor when `z` is None.
    """
    return units_surely_above(float(excess.double().mean()), unit_means(excess), bound, z)


def units_surely_above(mean: float, units: Tensor, bound: float, z: float | None) -> bool:
    """The same by the mean of the differences and their unit means."""
    if z is None or len(units) < _LEAST_UNITS:
        return False
    return mean - bound > z * float(units.std()) / math.sqrt(len(units))
