"""Number of tokens that the router sends to an expert."""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_deploy.pruning.experts.base import ExpertUse


class Frequency:
    """A baseline: blind to router weights and to what experts put out."""

    reads_text = True

    def scores(self, use: ExpertUse, _: torch.Generator) -> Tensor:
        """float64 `[experts]`."""
        return use.tokens.double()
