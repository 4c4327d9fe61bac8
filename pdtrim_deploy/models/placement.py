"""On which device each block of a model runs, whether its weights are there yet or not."""

from __future__ import annotations

import torch
from torch import nn

_PLACE = "pdtrim_device"  # of a decoder layer; copies of it keep the attribute


def put(layer: nn.Module, device: torch.device) -> None:
    """Say where `layer` runs; its weights go or come there by other hands."""
    setattr(layer, _PLACE, device)


def device_of(layer: nn.Module) -> torch.device:
    """Where a block runs: where it was `put`, else where its weights are."""
    device = getattr(layer, _PLACE, None)
    return next(layer.parameters()).device if device is None else device
