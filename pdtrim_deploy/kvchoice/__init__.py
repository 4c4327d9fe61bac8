"""KV selection methods by name."""

from __future__ import annotations

from collections.abc import Callable

from pdtrim_deploy.kvchoice.base import Cut, Problem, Progress, Selection, Sends
from pdtrim_deploy.kvchoice.by_attention import ByAttention
from pdtrim_deploy.kvchoice.by_harm import ByBudget, ByMeasuredHarm
from pdtrim_deploy.kvchoice.fixed import AllFull, AllSparse, AtRandom
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.recipe.kv import KVSection

__all__ = ["SELECTIONS", "Cut", "Problem", "Progress", "Selection", "Sends", "get_selection"]


def _cut(asked: KVSection) -> Cut:
    full = KVSend(wire_dtype=asked.wire_dtype)
    if asked.n_first + asked.n_last == 0:
        return Cut(full, full)
    return Cut(full, KVSend(mode="sparse", n_first=asked.n_first, n_last=asked.n_last, wire_dtype=asked.wire_dtype))


SELECTIONS: dict[str, Callable[[KVSection], Selection]] = {
    "none": lambda asked: AllFull(_cut(asked)),
    "all": lambda asked: AllSparse(_cut(asked)),
    "random": lambda asked: AtRandom(_cut(asked), asked.sparse_layers),
    "attention-mass": lambda asked: ByAttention(
        _cut(asked), "generated", None if asked.threshold else asked.sparse_layers, asked.threshold
    ),
    "simlayerkv": lambda asked: ByAttention(
        _cut(asked), "prompt", None if asked.threshold else asked.sparse_layers, asked.threshold
    ),
    "measured-harm": lambda asked: ByMeasuredHarm(_cut(asked), asked.sparse_layers),
    "budget": lambda asked: ByBudget(asked.options(), asked.reduction, asked.max_loss),
}


def get_selection(asked: KVSection) -> Selection:
    """The method that a recipe's section names, with its settings."""
    return SELECTIONS[asked.method](asked)
