"""A bundle for a measurement, built as the command builds it."""

from __future__ import annotations

from pathlib import Path

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.cli.progress import Progress
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.recipe import Recipe


def built(recipe: Recipe, folder: Path) -> Bundle:
    """In a log each step has a line when it ends, and one every two seconds until then: not one for each tensor."""
    progress = Progress()
    return build(recipe, folder, Cache.default(), progress.note, show=progress.show)
