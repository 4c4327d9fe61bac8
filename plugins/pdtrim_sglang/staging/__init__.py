"""Packed rows that an engine writes in its forward pass, kept until their chunks have left."""

from pdtrim_sglang.staging.arena import Arena
from pdtrim_sglang.staging.spans import Span, StagedBatch, Staging

__all__ = ["Arena", "Span", "StagedBatch", "Staging"]
