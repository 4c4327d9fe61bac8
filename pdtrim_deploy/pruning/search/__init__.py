"""Search methods by name."""

from __future__ import annotations

from collections.abc import Callable

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.search.base import Problem, Progress, Search, SearchResult, Step
from pdtrim_deploy.pruning.search.cosine import Cosine
from pdtrim_deploy.pruning.search.greedy import Greedy

__all__ = ["SEARCHES", "Problem", "Progress", "Search", "SearchResult", "Step", "get_search"]

SEARCHES: dict[str, Callable[[], Search]] = {"cosine": Cosine, "greedy": Greedy}


def get_search(name: str) -> Search:
    """The method of that name with its default settings; UserError lists those there are."""
    if name not in SEARCHES:
        raise UserError(f"pruning method {name!r} is unknown; use one of {', '.join(SEARCHES)}")
    return SEARCHES[name]()
