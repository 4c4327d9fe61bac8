"""Two or more served pairs under the same load, in turns, so that other programs slow all of them alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.loadtest.base import Driver, LoadResult, LoadRun
from pdtrim_deploy.loadtest.scenario import Scenario
from pdtrim_deploy.loadtest.workers import Key, WorkerFigures, Workers, summed
from pdtrim_deploy.local.student_t import t_975

LEAST_ROUNDS = 3
# Figure -> function that reads it from one round's result; None if that round has none.
FIGURES: dict[str, Callable[[LoadResult], float | None]] = {
    "TTFT p50": lambda r: r.ttft_ms.p50,
    "TTFT p95": lambda r: r.ttft_ms.p95,
    "ITL p50": lambda r: r.itl_ms.p50,
    "ITL p95": lambda r: r.itl_ms.p95,
    "TPOT p50": lambda r: r.tpot_ms.p50,
    "E2E p50": lambda r: r.e2e_ms.p50,
    "output tokens/s": lambda r: r.output_tokens_per_s,
    "requests/s": lambda r: r.requests_per_s,
    "goodput/s": lambda r: r.goodput_requests_per_s,
    "KV bytes a request": lambda r: r.workers.payload_bytes / max(1, r.workers.requests) if r.workers else None,
    "KV transfer time": lambda r: r.workers.transfer.mean_ms if r.workers and r.workers.transfer else None,
}


@dataclass(frozen=True)
class Side:
    """One served pair: its router, and its workers if they are known."""

    url: str
    workers: Workers | None = None


class Ratio(BaseModel):
    """One figure, second pair over first: geometric mean over rounds with its 95% interval (paired t on logarithms).

    `low` and `high` bound the mean of repetitions of this comparison on this machine, and nothing else.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    figure: str
    rounds: tuple[float, ...]
    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, figure: str, ratios: Sequence[float]) -> Ratio:
        """From each round's ratio; LEAST_ROUNDS at least, all above 0."""
        logs = [math.log(ratio) for ratio in ratios]
        mean, half = fmean(logs), t_975(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
        values = (math.exp(value) for value in (mean, mean - half, mean + half))
        return cls(figure=figure, rounds=tuple(ratios), **dict(zip(("ratio", "low", "high"), values, strict=True)))

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 1."""
        return not self.low <= 1.0 <= self.high


@dataclass(frozen=True)
class Rounds:
    """Results of each pair in each round, in the order of the rounds, and over all rounds."""

    by_round: dict[str, list[LoadResult]]
    total: dict[str, LoadResult]

    def ratios(self, first: str, second: str) -> list[Ratio]:
        """Ratios of each figure that every round of both pairs has."""
        computed = []
        for figure, pairs in self._pairs(first, second).items():
            if all(a and b for a, b in pairs):
                computed.append(Ratio.of(figure, [b / a for a, b in pairs]))  # type: ignore[operator]
        return computed

    def dropped(self, first: str, second: str) -> list[str]:
        """One sentence for each figure without a ratio, except figures that no round has."""
        sentences = []
        for figure, pairs in self._pairs(first, second).items():
            lacking = sum(not (a and b) for a, b in pairs)
            if lacking and any(figures is not None for pair in pairs for figures in pair):
                sentences.append(f"{figure} has no ratio: it is 0 or missing in {lacking} of {len(pairs)} rounds")
        return sentences

    def _pairs(self, first: str, second: str) -> dict[str, list[tuple[float | None, float | None]]]:
        rounds = list(zip(self.by_round[first], self.by_round[second], strict=True))
        return {figure: [(read(a), read(b)) for a, b in rounds] for figure, read in FIGURES.items()}


def check_rounds(rounds: int) -> None:
    """UserError when there are too few rounds for an interval."""
    if rounds < LEAST_ROUNDS:
        raise UserError(
            f"--rounds {rounds} gives no confidence interval; use at least {LEAST_ROUNDS}, better 6 or more"
        )


def check_dealt(requests: int, rounds: int) -> None:
    """The same when `requests` are divided among the rounds, at least one each."""
    check_rounds(rounds)
    if requests < LEAST_ROUNDS:
        raise UserError(
            f"--requests {requests} are too few to divide among rounds, and fewer than {LEAST_ROUNDS} rounds give "
            f"no confidence interval; use at least {LEAST_ROUNDS}"
        )


def interleave(
    sides: Mapping[str, Side],
    rounds: Sequence[Scenario],
    drive: Driver,
    driver_name: str,
    note: Callable[[str], None] = lambda _: None,
) -> Rounds:
    """Run every scenario of `rounds` on every pair, the order changing from round to round; warm up once each.

    Raises:
        ServingError: a worker's metrics do not answer.

    """
    first = rounds[0]
    for name, side in sides.items():
        note(f"warming up {name}")
        drive(side.url, first.warming())
    runs: dict[str, list[LoadRun]] = {name: [] for name in sides}
    added: dict[str, list[dict[Key, float]]] = {name: [] for name in sides}
    figures: dict[str, list[LoadResult]] = {name: [] for name in sides}
    for number, scenario in enumerate(rounds):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            note(f"round {number + 1} of {len(rounds)}, {name}")
            side = sides[name]
            before = side.workers.read() if side.workers else None
            run = drive(side.url, scenario.changed(warmup=0))
            runs[name].append(run)
            if side.workers and before is not None:
                added[name].append(side.workers.since(before, run.answered))
            figures[name].append(LoadResult.of(driver_name, [run], scenario.slo, _counted(added[name][-1:])))
    # Between its rounds a pair counts health checks, which are no part of the load.
    total = {name: LoadResult.of(driver_name, runs[name], first.slo, _counted(added[name])) for name in sides}
    return Rounds(figures, total)


def _counted(added: Sequence[dict[Key, float]]) -> WorkerFigures | None:
    return WorkerFigures.of(summed(added)) if added else None


def shares(scenario: Scenario, rounds: int) -> list[Scenario]:
    """The scenario's requests divided among `rounds` rounds with different seeds."""
    total = scenario.requests or 0
    return [
        scenario.changed(requests=len(range(n, total, rounds)), seed=scenario.seed + n)
        for n in range(min(rounds, total))
    ]


def repeats(scenario: Scenario, rounds: int) -> list[Scenario]:
    """The whole scenario `rounds` times, with another seed each time."""
    return [scenario.changed(seed=scenario.seed + n) for n in range(rounds)]


class Comparison(BaseModel):
    """Ratios of `second` over `first`; `load` has the absolute figures of each side for the record.

    `link` is the speed of the relay on loopback that carried the KV; None: no relay. `dropped` says which figures have
    no ratio, and why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: str
    second: str
    scenario: dict[str, Any]
    link: str | None = None
    rounds: int
    ratios: tuple[Ratio, ...]
    dropped: tuple[str, ...] = ()
    load: dict[str, LoadResult]
    environment: dict[str, Any]

    @property
    def problems(self) -> list[str]:
        """Reasons to doubt the ratios, one sentence each."""
        sentences = [f"{n}: {r.failed} of {r.requests} requests failed" for n, r in self.load.items() if r.failed]
        sentences += [f"{n}: {r.client.bottleneck}" for n, r in self.load.items() if r.client.bottleneck]
        return [*sentences, *self.dropped]
