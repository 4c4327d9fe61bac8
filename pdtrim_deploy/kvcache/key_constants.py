"""What both ends know of one layer's keys: their mean and key scales (`kvcache/key_offsets.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 4  # exponents are in quarters: in whole powers of two products erred by a sixth more (0.5B, one trial)
MAX_EXPONENT = 8 * STEPS  # of a key scale, and its inverse's


class KeyConstants(NamedTuple):
    """Of one layer, float32 `[kv_heads, head_dim]` each: the mean before RoPE, the key scale and its inverse."""

    mean: Tensor
    scale: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, mean: Tensor, exponents: Tensor) -> KeyConstants:
        """`exponents`: integers `[kv_heads, head_dim / 2]`; 2^(e / STEPS) is the scale of channels i and half + i."""
        both = torch.cat((exponents, exponents), -1).int()
        roots = torch.tensor([2 ** (step / STEPS) for step in range(STEPS)], device=mean.device)
        scale, inverse = (
            roots[signed % STEPS] * ((127 + signed.div(STEPS, rounding_mode="floor")) << 23).view(torch.float32)
            for signed in (both, -both)
        )
        return cls(mean, scale, inverse)

    def map(self, change: Callable[[Tensor], Tensor]) -> KeyConstants:
        """Each of the three, changed."""
        return KeyConstants(*map(change, self))
