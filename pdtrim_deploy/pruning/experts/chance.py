"""Experts kept at random: what any criterion must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_deploy.pruning.experts.base import ExpertUse


class Chance:
    """A baseline that reads no text."""

    reads_text = False

    def scores(self, use: ExpertUse, generator: torch.Generator) -> Tensor:
        """float64 `[experts]`."""
        return torch.rand(len(use.tokens), dtype=torch.float64, generator=generator)
