"""Values as a KV pool of some dtype holds them: how a dequantised row is rounded when it arrives."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def to_rows(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in a pool's dtype, rounded to nearest even.

    fp8 saturates, so that what a quantised wire adds to the largest value makes no infinity of it; NaN is 0x7f.
    """
    if dtype not in FP8 or values.dtype == dtype:
        return values.to(dtype)
    most = torch.finfo(dtype).max
    return torch.where(values.isnan(), torch.nan, values.float().clamp(-most, most)).to(dtype)
