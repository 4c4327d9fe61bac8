"""Checkpoints in and out: sources, families, loading, block surgery."""

from pdtrim_deploy.models.checkpoint import Checkpoint, ModelFacts, open_checkpoint
from pdtrim_deploy.models.families import FAMILIES, Family
from pdtrim_deploy.models.sources.registry import DEFAULT_SOURCE, SOURCES, resolve

__all__ = [
    "DEFAULT_SOURCE",
    "FAMILIES",
    "SOURCES",
    "Checkpoint",
    "Family",
    "ModelFacts",
    "open_checkpoint",
    "resolve",
]
