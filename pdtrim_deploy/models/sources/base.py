"""Where checkpoints come from: `kind:place`, one module a kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pdtrim_deploy.local.cache import Cache

Log = Callable[[str], None]


def silent(_: str) -> None:
    """A `Log` that says nothing."""


class Source(Protocol):
    """One kind of source."""

    kind: str
    usage: str

    def folder(self, place: str, cache: Cache, log: Log) -> Path:
        """A HF folder (config.json, safetensors, tokenizer) for what stands behind the colon; or UserError."""
        ...
