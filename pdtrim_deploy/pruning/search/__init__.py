"""Search methods by name."""

from __future__ import annotations

from collections.abc import Callable

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.search.base import Problem, Progress, Search, SearchResult, Settings, Step
from pdtrim_deploy.pruning.search.cosine import Cosine
from pdtrim_deploy.pruning.search.greedy import Greedy
from pdtrim_deploy.pruning.search.trajectory import Trajectory

__all__ = [
    "SEARCHES",
    "Problem",
    "Progress",
    "Search",
    "SearchResult",
    "Settings",
    "Step",
    "Trajectory",
    "get_search",
]

SEARCHES: dict[str, Callable[[Settings], Search]] = {
    "cosine": lambda _: Cosine(),
    "greedy": lambda _: Greedy(),
}


def get_search(name: str, settings: Settings = Settings()) -> Search:  # noqa: B008 - frozen
    """The method of that name; UserError lists those there are."""
    if name not in SEARCHES:
        raise UserError(f"pruning method {name!r} is unknown; use one of {', '.join(SEARCHES)}")
    return SEARCHES[name](settings)
