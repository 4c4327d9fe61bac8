"""Search methods by name."""

from __future__ import annotations

from collections.abc import Callable

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pruning.search.anneal import Anneal
from pdtrim_deploy.pruning.search.base import DEFAULTS, Problem, Progress, Search, SearchResult, Settings, Step
from pdtrim_deploy.pruning.search.cosine import Cosine
from pdtrim_deploy.pruning.search.greedy import Greedy
from pdtrim_deploy.pruning.search.perplexity import OneShotPerplexity
from pdtrim_deploy.pruning.search.random_blocks import RandomBlocks
from pdtrim_deploy.pruning.search.sleb import SLEB
from pdtrim_deploy.pruning.search.streamline import Streamline
from pdtrim_deploy.pruning.search.trajectory import Trajectory

__all__ = [
    "DEFAULTS",
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
    "anneal": Anneal,
    "cosine": lambda _: Cosine(),
    "greedy": lambda _: Greedy(),
    "perplexity": lambda _: OneShotPerplexity(),
    "random": RandomBlocks,
    "sleb": lambda _: SLEB(),
    "streamline": lambda _: Streamline(),
}


def get_search(name: str, settings: Settings = DEFAULTS) -> Search:
    """The method of that name; UserError lists those there are."""
    if name not in SEARCHES:
        raise UserError(f"pruning method {name!r} is unknown; use one of {', '.join(SEARCHES)}")
    return SEARCHES[name](settings)
