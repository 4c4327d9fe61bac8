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


def surely_above(excess: Tensor, bound: float, z: float | None) -> bool:
    """Is the mean of paired differences `[sequences, scored]` above `bound` by more than `z` of its standard errors?

    Never with fewer than 8 units, nor when `z` is None.
    """
    units = torch.cat([part.double().mean(1) for part in excess.split(_UNIT_TOKENS, dim=1)])
    if z is None or len(units) < _LEAST_UNITS:
        return False
    return float(excess.double().mean()) - bound > z * float(units.std()) / math.sqrt(len(units))
