"""What a layer is handed beside hidden states: the K and V that it holds, and where the tokens of a call stand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pdtrim_deploy.models.linear_attention import State

Angles: TypeAlias = "tuple[Tensor, ...] | Tensor"
"""Cosines and sines of RoPE, or both as one complex tensor (DeepSeek-V2's)."""

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Half-open ranges of absolute positions, ascending and disjoint."""


@dataclass
class LayerKV:
    """K and V that one layer holds, and where their tokens stand. Stands in for transformers' `Cache`.

    `update` makes new tensors and never writes into old ones, so a prompt's K and V may be shared.

    Attributes:
        keys, values: `[batch, kv_heads, tokens, head_dim]`, K after RoPE; None when nothing is held yet. Of a layer
            with latents (MLA) rope keys and latents, as `models/latents.py` says.
        ranges: absolute positions of those tokens.
        pool: dtype that rows are rounded to as they are written, before attention reads them, by torch's conversion as
            in SGLang's fp8 pools without scales; None: as the layer computed them.
        state: of a layer with linear attention, which has no keys and values (`models/linear_attention.py`); None when
            nothing is held yet.

    """

    keys: Tensor | None = None
    values: Tensor | None = None
    ranges: Ranges = ()
    pool: torch.dtype | None = None
    state: State | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append what the layer computed; called by the attention module."""
        if self.pool is not None:
            keys, values = (side.to(self.pool).to(side.dtype) for side in (keys, values))
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        else:
            self.keys = torch.cat((self.keys, keys), dim=-2)
            self.values = torch.cat((self.values, values), dim=-2)
        return self.keys, self.values

    def fork(self) -> LayerKV:
        """The same K and V, or state, to be extended on its own."""
        return LayerKV(self.keys, self.values, self.ranges, self.pool, self.state)

    def move(self, device: torch.device) -> None:
        """To the device of the layer that reads it."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.to(device), self.values.to(device)
        if self.state is not None:
            self.state = self.state[0].to(device), self.state[1].to(device)


@dataclass(frozen=True)
class Span:
    """Tokens `[start, stop)` of a sequence, with what every block needs to know of their positions.

    With several `branches` they are as many alternatives of equal length side by side, each at `start`. `angles` are
    those of RoPE by kind of layer, or of all layers under None.
    """

    start: int
    stop: int
    branches: int
    positions: Tensor
    angles: dict[str | None, Angles]
    masks: dict[tuple[Ranges, int | None], Tensor] = field(default_factory=dict)
    by_device: dict[torch.device, Span] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device) -> Span:
        """The same on a device; moved once."""
        if device == self.positions.device:
            return self
        if device not in self.by_device:
            angles = {kind: _moved(part, device) for kind, part in self.angles.items()}
            moved = Span(self.start, self.stop, self.branches, self.positions.to(device), angles)
            self.by_device[device] = moved
        return self.by_device[device]


def _moved(angles: Angles, device: torch.device) -> Angles:
    return angles.to(device) if isinstance(angles, Tensor) else tuple(part.to(device) for part in angles)
