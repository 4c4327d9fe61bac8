"""The requests of a scenario: when each is due, its prompt, and its number of output tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pdtrim_deploy.loadtest.scenario import Arrivals, Lengths, Prefixes, Scenario, Trace
from pdtrim_deploy.loadtest.text import named, text
from pdtrim_deploy.loadtest.trace import rows


@dataclass(frozen=True)
class Job:
    """One request; `due_s` after the load's start, None if a client sends it when its previous one has ended.

    `later` are the turns of a conversation that follow it: the prompt of each is the text that comes after the answer.
    """

    due_s: float | None
    prompt: str
    output_tokens: int
    later: tuple[Job, ...] = ()


def jobs(scenario: Scenario) -> Iterator[Job]:
    """The requests of the load in order, generated as needed; the same for the same scenario."""
    due = _drawn(scenario) if scenario.trace is None else _replay(scenario.trace, scenario.seed)
    if scenario.duration_s is not None:
        due = _until(due, scenario.duration_s)
    return due if scenario.requests is None else _first(due, scenario.requests)


def tokens(lengths: Lengths, rng: random.Random) -> int:
    """One draw, at least 1."""
    match lengths.kind:
        case "fixed":
            return lengths.tokens or 1
        case "uniform":
            return rng.randint(lengths.low or 1, lengths.high or 1)
        case "normal":
            value = rng.gauss(lengths.tokens or 1, lengths.spread or 0)
        case "lognormal":
            value = (lengths.tokens or 1) * math.exp(rng.gauss(0, lengths.spread or 0))
    return int(min(max(round(value), lengths.low or 1), lengths.high or math.inf))


def _drawn(scenario: Scenario) -> Iterator[Job]:
    rng, times = random.Random(scenario.seed), _times(scenario)
    for due in times:
        prompt = text(rng, tokens(scenario.input, rng))
        if scenario.prefixes is not None:
            prompt = _prefixed(prompt, scenario.prefixes, rng)
        job = Job(due, prompt, tokens(scenario.output, rng))
        yield job if scenario.conversations is None else replace(job, later=_later(scenario, rng))


def _later(scenario: Scenario, rng: random.Random) -> tuple[Job, ...]:
    """The turns of a conversation after its first."""
    assert scenario.conversations is not None
    turns = range(1, scenario.conversations.turns)
    return tuple(Job(None, text(rng, tokens(scenario.input, rng)), tokens(scenario.output, rng)) for _ in turns)


def _first(due: Iterator[Job], requests: int) -> Iterator[Job]:
    """So many requests, each turn counted; the last conversation may be cut short."""
    while requests > 0 and (job := next(due, None)) is not None:
        yield replace(job, later=job.later[: requests - 1])
        requests -= 1 + len(job.later)


def _prefixed(prompt: str, prefixes: Prefixes, rng: random.Random) -> str:
    """The texts are the same for every seed: rounds share them, as users of one application do."""
    if rng.random() >= prefixes.share:
        return prompt
    return f"{named(f'prefix {rng.randrange(prefixes.count)}', prefixes.tokens)} {prompt}"


def _times(scenario: Scenario) -> Iterator[float | None]:
    """Due times without end. Poisson arrivals are a unit-rate process through the inverse of the cumulative rate."""
    arrivals, rng, units = scenario.arrivals, random.Random(f"arrivals {scenario.seed}"), 0.0
    inverse = _inverse(arrivals, scenario.duration_s or math.inf)
    while True:
        yield None if inverse is None else inverse(units)
        units += 1.0 if arrivals.kind == "constant" else rng.expovariate(1.0)


def _inverse(arrivals: Arrivals, duration_s: float) -> Callable[[float], float] | None:
    """Seconds after which `units` requests are expected; None for a closed loop."""
    rate = arrivals.rate
    if rate is None:
        return None
    slope = ((arrivals.to_rate or rate) - rate) / duration_s
    if slope == 0:
        return lambda units: units / rate
    # rate t + slope t^2 / 2 = units; a falling ramp never reaches more than its peak
    return lambda units: (math.sqrt(root) - rate) / slope if (root := rate**2 + 2 * slope * units) > 0 else math.inf


def _until(due: Iterator[Job], duration_s: float) -> Iterator[Job]:
    for job in due:
        if job.due_s is not None and job.due_s > duration_s:
            return
        yield job


def _replay(trace: Trace, seed: int) -> Iterator[Job]:
    for row in rows(Path(trace.path)):
        prompt = _shared(trace, row.ids, row.input_tokens, f"{seed} {row.number}")
        yield Job(row.at_ms / 1e3 / trace.speed, prompt, max(1, round(row.output_tokens * trace.scale)))


def _shared(trace: Trace, ids: Sequence[int], length: int, label: str) -> str:
    """Text that begins with the blocks of `ids`; the rest is unique to the request."""
    words, block = max(1, round(length * trace.scale)), max(1, round(trace.block_tokens * trace.scale))
    parts = [named(f"block {id_}", min(block, words - n * block)) for n, id_ in enumerate(ids) if words > n * block]
    rest = words - block * len(ids)
    return " ".join([*parts, named(f"own {label}", rest)] if rest > 0 else parts)
