"""KV selection methods by name."""

from __future__ import annotations

from collections.abc import Callable

from pdtrim_deploy.kvchoice.base import Cut, Problem, Progress, Selection, Sends
from pdtrim_deploy.kvchoice.by_attention import ByAttention
from pdtrim_deploy.kvchoice.by_harm import ByBudget, ByMeasuredHarm
from pdtrim_deploy.kvchoice.fixed import AllFull, AllSparse, AtRandom
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.recipe.kv import KVSection, cut_to

__all__ = ["SELECTIONS", "Cut", "Problem", "Progress", "Selection", "Sends", "get_selection"]


def _cut(section: KVSection) -> Cut:
    full = KVSend(wire_dtype=section.wire_dtype)
    if section.n_first + section.n_last == 0:
        return Cut(full, full)
    return Cut(full, cut_to(section.n_first, section.n_last, section.share, wire_dtype=section.wire_dtype))


SELECTIONS: dict[str, Callable[[KVSection], Selection]] = {
    "none": lambda section: AllFull(_cut(section)),
    "all": lambda section: AllSparse(_cut(section)),
    "random": lambda section: AtRandom(_cut(section), section.sparse_layers),
    "attention-mass": lambda section: ByAttention(
        _cut(section), "generated", None if section.threshold else section.sparse_layers, section.threshold
    ),
    "simlayerkv": lambda section: ByAttention(
        _cut(section), "prompt", None if section.threshold else section.sparse_layers, section.threshold
    ),
    "measured-harm": lambda section: ByMeasuredHarm(_cut(section), section.sparse_layers),
    "budget": lambda section: ByBudget(section.options(), section.reduction, section.max_loss),
}


def get_selection(section: KVSection) -> Selection:
    """The method that a recipe's section names, with its settings."""
    return SELECTIONS[section.method](section)
