"""The workers and the link that carry a rate within an SLO, by closed formulas; a simulation can check them.

Waiting is bounded by Lundberg's inequality: in a first-come queue whose service takes s and whose gaps are sums of n
exponential ones of rate r (one worker's share of Poisson arrivals that n workers take in turns),
P(wait > t) <= exp(-k t), where k > 0 solves n ln(1 + k/r) = k s. For n = 1 it is the M/D/1 queue.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.link import Link
from pdtrim_deploy.sizing.rates import Rates

MISSED = 0.025  # share of requests that may wait longer than allowed: at prefill, and again at the link
NORMAL_95, NORMAL_975 = 1.645, 1.96
MOST_WORKERS = 1e15  # most workers of a stage that are tried


@dataclass(frozen=True)
class Goal:
    """The load: requests/s of `isl` + `osl` tokens; 95% of them must have TTFT and mean ITL within the SLO.

    `link` is one for all requests, or one of each prefill worker when `link_each`; at most `max_utilisation` of it.
    """

    rate: float
    isl: int
    osl: int
    ttft_s: float
    itl_s: float
    link: Link
    link_each: bool = False
    max_utilisation: float = 0.8


class Sizing(BaseModel):
    """Workers of each stage; if no number of them suffices, None, and `problem` says why.

    Attributes:
        decode_batch: largest batch whose step is within the SLO's ITL, measured, and held by the pool.
        ttft_p95_ms: upper bound with these workers and the goal's link.
        link_bits_per_s_needed: smallest with which these prefill workers keep the SLO.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill_workers: int | None = None
    decode_workers: int | None = None
    decode_batch: int | None = None
    ttft_p95_ms: float | None = None
    link_bits_per_s_needed: float | None = None
    problem: str | None = None


def rates_of(plan: PDPlan, unpruned: Rates, tokens: int) -> Rates:
    """Rates of a plan's stages, scaled by their share of the blocks' work at prompts of so many tokens."""
    return unpruned.scaled(plan.prefill_share(tokens), plan.decode_share)


def size(rates: Rates, request_bytes: int, goal: Goal) -> Sizing:
    """The fewest workers of each stage that carry `goal`."""
    batch = _batch(rates, goal)
    if batch < 1:
        if rates.pool_tokens is not None and rates.pool_tokens < goal.isl + goal.osl:
            held = f"pool_tokens {rates.pool_tokens} hold no request of {goal.isl + goal.osl} tokens"
            return Sizing(problem=f"{held}; raise them or shorten --isl and --osl")
        step = rates.steps_s()[1] * 1e3
        return Sizing(problem=f"a decode step of one request takes {step:.4g} ms; raise --slo-itl above it")
    wire = request_bytes / goal.link.bytes_per_s
    prefill = _prefill_workers(rates, goal, batch, wire)
    ttft = goal.ttft_s if prefill is None else _ttft_s(rates, goal, batch, prefill, wire)
    known: dict[str, Any] = {"decode_workers": _decode_workers(rates, goal, batch, ttft), "decode_batch": batch}
    if prefill is None:
        prefill = _prefill_workers(rates, goal, batch, 0.0)
        if prefill is None:
            least = _parts_s(rates, goal, batch) * 1e3
            problem = f"TTFT is {least:.4g} ms without any load and link; raise --slo-ttft above it"
            return Sizing(problem=problem, **known)
        needed = _link_needed(rates, goal, batch, prefill, request_bytes)
        problem = f"the {goal.link} link is too slow; {Link(needed)} would do"
        return Sizing(link_bits_per_s_needed=needed, problem=problem, **known)
    return Sizing(
        prefill_workers=prefill,
        ttft_p95_ms=ttft * 1e3,
        link_bits_per_s_needed=_link_needed(rates, goal, batch, prefill, request_bytes),
        **known,
    )


def wait_s(rate: float, turns: int, service_s: float, missed: float = MISSED) -> float:
    """Bound that a share `missed` of waits may exceed; infinite when the queue is overloaded."""
    if rate * service_s >= turns:
        return math.inf
    if rate * service_s <= missed * turns:  # at most that share waits at all
        return 0.0
    low, high = 0.0, 1.0 / service_s
    while turns * math.log1p(high / rate) > high * service_s:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if turns * math.log1p(middle / rate) > middle * service_s else (low, middle)
    return math.log(1 / missed) / high if high else math.inf


def _batch(rates: Rates, goal: Goal) -> int:
    """The largest batch within the ITL, at most the largest measured one: beyond it step times are extrapolated."""
    most = min(rates.max_running, max(rates.decode_step_ms))
    if rates.pool_tokens is not None:
        most = min(most, _held(rates.pool_tokens, goal))
    steps = rates.steps_s()
    return max((batch for batch in range(1, most + 1) if steps[batch] <= goal.itl_s), default=0)


def _held(pool_tokens: int, goal: Goal) -> int:
    """Number of requests that a pool can hold at once."""
    return pool_tokens // (goal.isl + goal.osl)


def _decode_workers(rates: Rates, goal: Goal, batch: int, ttft_s: float) -> int:
    """Workers such that each decodes at most `batch` requests, and its pool holds all requests that need rows.

    Rows are held from admission, which comes before prefill, to the last token.
    """
    decoding = (goal.osl - 1) * rates.steps_s()[batch]
    workers = _share(goal.rate * decoding, batch)
    if rates.pool_tokens is None:
        return workers
    return max(workers, _share(goal.rate * (ttft_s + decoding), _held(rates.pool_tokens, goal)))


def _share(requests: float, most: int) -> int:
    """Workers whose share of `requests` at once (Little's law), about Poisson, is at most `most` 95% of the time."""
    root = (math.sqrt(NORMAL_95**2 + 4 * most) - NORMAL_95) / 2  # m + 1.645 sqrt(m) = most
    return max(1, math.ceil(min(requests, sys.float_info.max) / root**2))


def _prefill_workers(rates: Rates, goal: Goal, batch: int, wire_s: float) -> int | None:
    def enough(workers: int) -> bool:
        return _carries(goal, wire_s, workers) and _ttft_s(rates, goal, batch, workers, wire_s) <= goal.ttft_s

    # Once hardly any request waits, more workers do not help; the wait at a shared link does not depend on workers.
    workers, most = 1, goal.rate * (rates.alone_s(goal.isl) + wire_s) / MISSED
    while not enough(workers):
        if workers > min(most, MOST_WORKERS):
            return None
        workers *= 2
    fewer = range(workers // 2 + 1, workers)
    return workers // 2 + 1 + bisect_left(fewer, True, key=enough) if fewer else workers


def _carries(goal: Goal, wire_s: float, workers: int) -> bool:
    return goal.rate * wire_s / (workers if goal.link_each else 1) <= goal.max_utilisation


def _parts_s(rates: Rates, goal: Goal, batch: int) -> float:
    """Parts of TTFT without waits and link, with the full decode step that may be running when KV arrives."""
    return (rates.overhead_ms + rates.transfer_ms) / 1e3 + rates.alone_s(goal.isl) + rates.steps_s()[batch]


def _ttft_s(rates: Rates, goal: Goal, batch: int, workers: int, wire_s: float) -> float:
    """Bound of TTFT's 95th percentile."""
    waits = wait_s(goal.rate, workers, rates.alone_s(goal.isl)) + _mates_s(rates, goal, workers)
    waits += wait_s(goal.rate / (workers if goal.link_each else 1), 1, wire_s)
    return _parts_s(rates, goal, batch) + wire_s + waits


def _mates_s(rates: Rates, goal: Goal, workers: int) -> float:
    """Time that a prompt of several chunks waits for prompts that fill up its last chunk."""
    last = (goal.isl - 1) % rates.chunk_tokens + 1
    came = goal.rate * (rates.alone_s(goal.isl) - last / rates.prefill_tokens_per_s)  # at all workers
    if last == goal.isl or came <= MISSED * workers:
        return 0.0
    taken = (came + NORMAL_975 * math.sqrt(came) + 1) / workers  # each takes every `workers`th
    mates = math.floor(min(taken, rates.chunk_tokens))
    return min(rates.chunk_tokens - last, mates * goal.isl) / rates.prefill_tokens_per_s


def _link_needed(rates: Rates, goal: Goal, batch: int, workers: int, request_bytes: int) -> float:
    """The smallest sufficient link in bits/s, to 0.1%."""
    low, high = 1.0, 1e18
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        wire = request_bytes * 8 / middle
        enough = _carries(goal, wire, workers) and _ttft_s(rates, goal, batch, workers, wire) <= goal.ttft_s
        low, high = (low, middle) if enough else (middle, high)
    return high
