"""REAP (arXiv:2510.13999): the mean, over the tokens sent to an expert, of router weight x norm of its output.

An expert that few tokens use, but strongly, outranks another that many use weakly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_deploy.pruning.experts.base import ExpertUse


class Reap:
    """Experts that no token was sent to have score 0."""

    reads_text = True

    def scores(self, use: ExpertUse, _: torch.Generator) -> Tensor:
        """float64 `[experts]`."""
        return use.weighted_norms / use.tokens.clamp(min=1)
