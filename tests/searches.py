"""Searches of both stages in one call, methods by name; baselines of benchmarks/ among them."""

import sys
from pathlib import Path

from pdtrim_deploy.pruning.finalists import FinalRound
from pdtrim_deploy.pruning.search import DEFAULTS, get_search
from pdtrim_deploy.pruning.stage_search import SearchInputs
from pdtrim_deploy.pruning.stages import choose_stages

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from baselines import BASELINES


def search_of(method, settings=DEFAULTS):
    return BASELINES[method].search(settings) if method in BASELINES else get_search(method, settings)


def stages_of(
    model, ids, prefill, decode, *, method="greedy", settings=DEFAULTS, judge=None, finalists=0, prompt_tokens=None,
    progress=lambda _: None, **more,
):  # fmt: skip
    search = search_of(method, settings) if isinstance(method, str) else method
    final_round = FinalRound(judge, finalists) if judge and finalists else None
    inputs = SearchInputs(model, ids, search, final_round=final_round, **more)
    return choose_stages(inputs, prefill, decode, prompt_tokens, progress)


def spent(*choices):
    """Block-forwards."""
    return sum(choice.cost.block_forwards for choice in choices)
