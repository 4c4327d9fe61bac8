"""`hf:DIR`: a HF folder as it lies on disk."""

from __future__ import annotations

from pathlib import Path

from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.paths import expanded, resolved
from pdtrim_deploy.models.sources.base import Log


class HFSource:
    """Used in place: nothing is copied."""

    kind = "hf"
    usage = "hf:DIR"

    def folder(self, place: str, cache: Cache, log: Log) -> Path:
        """The folder itself; `open_checkpoint` judges it."""
        return resolved(expanded(place))
