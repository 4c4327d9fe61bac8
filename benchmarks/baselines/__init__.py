"""Searches that exist to be compared with, each with what it will cost; no recipe can name them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from baselines.perplexity import OneShotPerplexity
from baselines.random_blocks import RandomBlocks
from baselines.sleb import SLEB
from pdtrim_deploy.pruning.search import Search, Settings
from pdtrim_deploy.recipe.pruning_methods import Work, WorkEstimate


@dataclass(frozen=True)
class Baseline:
    """Makes its search, and says what that costs."""

    search: Callable[[Settings], Search]
    work: WorkEstimate


def _sleb(blocks: int, first: int, last: int, _: int) -> Work:
    """The first and the last block are no candidates."""
    rounds = [blocks - gone for gone in range(first, last)]
    most = sum((left - 2) * (left - 1) for left in rounds)
    return Work(most, most, sum(left - 2 for left in rounds))


def _perplexity(blocks: int, first: int, _: int, __: int) -> Work:
    left = blocks - first
    most = left * (left - 1) / 2 + left
    return Work(most, most, left)


def _none(*_: int) -> Work:
    return Work(0, 0, 0)


BASELINES: dict[str, Baseline] = {
    "perplexity": Baseline(lambda _: OneShotPerplexity(), _perplexity),
    "random": Baseline(lambda settings: RandomBlocks(settings.seed), _none),
    "sleb": Baseline(lambda _: SLEB(), _sleb),
}
