"""KV selection methods by name."""

from __future__ import annotations

from collections.abc import Callable

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvcache.selection.base import Progress, Request, Selection
from pdtrim_deploy.kvcache.selection.by_attention import ByAttentionMass
from pdtrim_deploy.kvcache.selection.by_harm import ByMeasuredHarm
from pdtrim_deploy.kvcache.selection.fixed import AllFull, AllSparse

__all__ = ["SELECTIONS", "Progress", "Request", "Selection", "get_selection"]

SELECTIONS: dict[str, Callable[[], Selection]] = {
    "none": AllFull,
    "all": AllSparse,
    "attention-mass": ByAttentionMass,
    "measured-harm": ByMeasuredHarm,
}


def get_selection(name: str) -> Selection:
    """The method of that name with its default settings; UserError lists those there are."""
    if name not in SELECTIONS:
        raise UserError(f"KV method {name!r} is unknown; use one of {', '.join(SELECTIONS)}")
    return SELECTIONS[name]()
