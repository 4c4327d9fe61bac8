"""What both ends know of one layer's keys: their mean and key scales (`kvcache/key_offsets.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 4  # exponents are in quarters
MAX_EXPONENT = 8 * STEPS  # of a key scale, and its inverse's


@dataclass(frozen=True, eq=False)
class KeyConstants:
    """Of one layer, `values`: float32 `[3, kv_heads, head_dim]`: means before RoPE, key scales and their inverses."""

    values: Tensor

    @classmethod
    def of(cls, mean: Tensor, exponents: Tensor) -> KeyConstants:
        """`exponents`: integers `[kv_heads, head_dim / 2]`; 2^(e / STEPS) is the scale of channels i and half + i."""
        both = torch.cat((exponents, exponents), -1).int()
        roots = torch.tensor([2 ** (step / STEPS) for step in range(STEPS)], dtype=torch.float32, device=mean.device)
        scale, inverse = (
            roots[signed % STEPS] * ((127 + signed.div(STEPS, rounding_mode="floor")) << 23).view(torch.float32)
            for signed in (both, -both)
        )
        return cls(torch.stack((mean, scale, inverse)))

    @property
    def mean(self) -> Tensor:
        """float32 `[kv_heads, head_dim]`, as are the other two."""
        return self.values[0]

    @property
    def scale(self) -> Tensor:
        """What keys less their offset are multiplied by."""
        return self.values[1]

    @property
    def inverse(self) -> Tensor:
        """What they are multiplied by to be what they were."""
        return self.values[2]

    def heads(self, heads: range) -> KeyConstants:
        """Those of a range of these KV heads."""
        return KeyConstants(self.values[:, heads.start : heads.stop].contiguous())

    def to(self, device: torch.device) -> KeyConstants:
        """The same on a device."""
        return KeyConstants(self.values.to(device))

    def unscaled(self) -> KeyConstants:
        """The same means with scales of 1."""
        return KeyConstants(torch.stack((self.mean, *[torch.ones_like(self.mean)] * 2)))
