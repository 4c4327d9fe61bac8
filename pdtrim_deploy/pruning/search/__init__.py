"""Search methods by name; `pdtrim_deploy.recipe.pruning_methods` registers them."""

from __future__ import annotations

from importlib import import_module

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.search.base import (
    DEFAULTS,
    NO_COST,
    Cost,
    Problem,
    Progress,
    Search,
    SearchResult,
    Settings,
    Step,
)
from pdtrim_deploy.pruning.search.trajectory import Trajectory
from pdtrim_deploy.recipe.pruning_methods import METHODS

__all__ = [
    "DEFAULTS",
    "NO_COST",
    "Cost",
    "Problem",
    "Progress",
    "Search",
    "SearchResult",
    "Settings",
    "Step",
    "Trajectory",
    "get_search",
]


def get_search(name: str, settings: Settings = DEFAULTS) -> Search:
    """The method of that name; UserError lists those there are."""
    if name not in METHODS:
        raise UserError(f"pruning method {name!r} is unknown; use one of {', '.join(METHODS)}")
    search: Search = import_module(f"{__name__}.{name}").search(settings)
    return search
