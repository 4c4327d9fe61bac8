"""The KV rules that benchmarks/kv.py compares, each brought to a byte budget at one prompt length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pdtrim_deploy.kvchoice import Cut, Problem, Sends
from pdtrim_deploy.kvchoice.budget.search import BudgetSearch
from pdtrim_deploy.kvchoice.by_attention import ByAttention
from pdtrim_deploy.kvchoice.by_harm import budget_search
from pdtrim_deploy.kvchoice.fixed import AtRandom
from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.recipe.kv import KVSection

Log = Callable[[str], None]
FIRST = 4  # attention sinks, as in StreamingLLM and SimLayerKV
WINDOWS = (64, 16)  # last tokens of a cut layer: the larger one where it reaches the budget
FORBIDDEN = 1 << 60
ROUNDS = 0  # of measuring effects again about the answer: ten plans would take an hour of it here


@dataclass(frozen=True)
class Row:
    """One plan of the comparison; `requested` is the reduction it was made for, None without a choice."""

    method: str
    requested: float | None
    sends: Sends
    seed: int | None = None


def rows(
    problem: Problem, reductions: Sequence[float], random_seeds: int, note: Log, only_ours: bool = False
) -> Iterator[Row]:
    """Every method at every reduction, ours last; `only_ours` leaves out the other rules."""
    layers, plan = problem.layers, problem.oracle.plan
    yield Row("dense", None, (KVSend(),) * layers)
    for wire in ("int8", "int4", "k4v3", "int3"):
        yield Row(f"dense {wire}", None, (KVSend(wire_dtype=wire),) * layers)
    if not only_ours:
        yield from _others(problem, reductions, random_seeds, note)
    options = KVSection(method="budget", reduction=2.0, prompt_tokens=problem.prompt_tokens).options()  # its defaults
    free = budget_search(problem, options, note, ROUNDS)
    native = [option.wire_dtype == "native" for option in free.measure.options]
    kept = BudgetSearch(free.measure, np.where(native, free.costs, FORBIDDEN), note, ROUNDS)
    dense_bytes = plan.dense_bytes(problem.prompt_tokens)
    for reduction in reductions:
        yield Row("ours, native wire", reduction, kept.within(int(dense_bytes / reduction)).sends)
        yield Row("ours", reduction, free.within(int(dense_bytes / reduction)).sends)


def _others(problem: Problem, reductions: Sequence[float], random_seeds: int, note: Log) -> Iterator[Row]:
    plan = problem.oracle.plan
    window = Cut(KVSend(), KVSend(mode="sparse", n_first=FIRST, n_last=WINDOWS[0]))
    orders = {
        "StreamingLLM": None,
        "attention mass (PDTrim)": _ranked(ByAttention(window, "generated").scores(problem, note)),
        "SimLayerKV": _ranked(ByAttention(window, "prompt").scores(problem, note)),
    }
    drawn = {seed: _drawn(problem, window, seed) for seed in range(random_seeds)}
    for reduction in reductions:
        for method, order in orders.items():
            yield Row(method, reduction, _fitted(plan, problem.prompt_tokens, reduction, order))
        for seed, order in drawn.items():
            yield Row("random layers", reduction, _fitted(plan, problem.prompt_tokens, reduction, order), seed)


def _ranked(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))


def _drawn(problem: Problem, window: Cut, seed: int) -> list[int]:
    """The order in which `AtRandom` would cut layers."""
    seeded = Problem(problem.oracle, problem.sequences, problem.prompt_tokens, seed)
    order = list[int]()
    for count in range(1, problem.layers + 1):
        sends = AtRandom(window, count).choose(seeded, print)
        order += [layer for layer, send in enumerate(sends) if send.mode == "sparse" and layer not in order]
    return order


def _fitted(plan: PDPlan, tokens: int, reduction: float, order: list[int] | None) -> Sends:
    """The fewest first layers of `order` (all layers, if there is none), cut as little as the budget allows."""
    layers, budget = len(plan.kv), plan.dense_bytes(tokens) / reduction

    def sends(count: int, last: int) -> Sends:
        cut = set(range(layers) if order is None else order[:count])
        sparse = KVSend(mode="sparse", n_first=FIRST, n_last=last)
        return tuple(sparse if layer in cut else KVSend() for layer in range(layers))

    def fits(count: int, last: int) -> bool:
        return plan.with_kv(sends(count, last)).payload_bytes(tokens) <= budget

    if order is None:
        return sends(layers, max(last for last in range(1, tokens - FIRST) if fits(layers, last)))
    count, least = next((n, last) for last in WINDOWS for n in range(1, layers + 1) if fits(n, last))
    return sends(count, max(last for last in range(least, tokens - FIRST) if fits(count, last)))
