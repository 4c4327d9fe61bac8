"""The interface of load drivers, and the result of a load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.loadtest.scenario import SLO, Scenario
from pdtrim_deploy.loadtest.workers import WorkerFigures, Workers

PERCENTILES = (50, 90, 95, 99)
# Limits above which the client counts as a bottleneck: share of a core, for loads of at least so many seconds; delay as
# a share of the median TTFT or ITL, and in ms.
MOST_CPU, LEAST_WALL_S, MOST_LATE, LEAST_LATE_MS = 0.8, 1.0, 0.1, 10.0


class Percentiles(BaseModel):
    """Of one latency, in milliseconds; None when nothing was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, seconds: Sequence[float] | np.ndarray) -> Percentiles:
        """Percentiles (linear interpolation) of samples in seconds."""
        if not len(seconds):
            return cls(**dict.fromkeys(cls.model_fields))
        values = np.percentile(seconds, PERCENTILES) * 1e3
        return cls(**{name: round(float(v), 3) for name, v in zip(cls.model_fields, values, strict=True)})


@dataclass(frozen=True)
class Outcome:
    """One request as the client saw it; times in seconds from the moment it was sent.

    Attributes:
        failure: kind (`refused`, `http_503`, `timeout`, `truncated`, `error`), None when it succeeded.
        ttft: to the first token; itl: between tokens; e2e: to the end.
        prompt_tokens, output_tokens: as the server counted them.
        late: by how much it was sent after it was due (open loops).
        turn: its place in its conversation, from 0; text: the answer.

    """

    failure: str | None = None
    detail: str = ""
    ttft: float = 0.0
    itl: tuple[float, ...] = ()
    e2e: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    late: float = 0.0
    turn: int = 0
    text: str = field(default="", repr=False)

    def meets(self, slo: SLO) -> bool:
        """Whether it succeeded within the SLO: its TTFT and the mean of its ITLs."""
        if self.failure is not None:
            return False
        itl = sum(self.itl) / len(self.itl) if self.itl else 0.0
        return self.ttft * 1e3 <= (slo.ttft_ms or np.inf) and itl * 1e3 <= (slo.itl_ms or np.inf)


@dataclass(frozen=True)
class LoadRun:
    """One load: every request's outcome, and the wall time from the first request to the last token.

    Attributes:
        cpu_s: processor time of the client during the load; None if the driver does not report it.
        pauses: seconds by which the client woke too late from short sleeps, over the whole load.

    """

    outcomes: tuple[Outcome, ...]
    duration_s: float
    cpu_s: float | None = None
    pauses: tuple[float, ...] = field(default=(), repr=False)

    @property
    def answered(self) -> int:
        """Requests that did not fail."""
        return sum(outcome.failure is None for outcome in self.outcomes)


class Driver(Protocol):
    """Drives one load against the base URL of a router (`/generate` of SGLang)."""

    def __call__(self, url: str, scenario: Scenario) -> LoadRun: ...


class ClientFigures(BaseModel):
    """Whether the client was the bottleneck: then latencies include its own, and rates are limited by it.

    Attributes:
        send_late_ms: how late requests were sent (open loops).
        wake_late_ms: how late it woke from short sleeps; measured ITL may be wrong by this.
        cpu_share: of one core, which is all that it can use.
        bottleneck: one sentence with the reason; None when it was no bottleneck.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    send_late_ms: Percentiles
    wake_late_ms: Percentiles
    cpu_share: float | None
    bottleneck: str | None

    @classmethod
    def of(cls, runs: Sequence[LoadRun], ttft_ms: float | None, itl_ms: float | None) -> ClientFigures:
        """Compare the client's delays with the measured medians."""
        late = Percentiles.of([o.late for run in runs for o in run.outcomes])
        woke = Percentiles.of([pause for run in runs for pause in run.pauses])
        spent = [run.cpu_s for run in runs if run.cpu_s is not None]
        wall = sum(run.duration_s for run in runs if run.cpu_s is not None)
        share = round(sum(spent) / wall, 3) if wall else None
        causes = []
        if share is not None and share > MOST_CPU and wall > LEAST_WALL_S:
            causes.append(f"it used {share:.2f} of the one core it can use")
        if (late.p95 or 0.0) > (allowed := max(LEAST_LATE_MS, MOST_LATE * (ttft_ms or 0.0))):
            causes.append(f"p95 of requests were sent {late.p95:.0f} ms late ({allowed:.0f} ms are allowed)")
        if (woke.p95 or 0.0) > (allowed := max(LEAST_LATE_MS, MOST_LATE * (itl_ms or 0.0))):
            causes.append(f"it woke {woke.p95:.0f} ms late at p95 ({allowed:.0f} ms are allowed)")
        why = f"the client was a bottleneck: {'; '.join(causes)}" if causes else None
        return cls(send_late_ms=late, wake_late_ms=woke, cpu_share=share, bottleneck=why)


class LoadResult(BaseModel):
    """Totals of a load; latencies cover successful requests only, failures are counted by kind.

    `tpot_ms` is (E2E - TTFT) / (output tokens - 1) per request; `itl_ms` is over all gaps of all requests, a chunk
    of k tokens counting as k equal gaps. `goodput` is of requests within the SLO, None without one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    driver: str
    requests: int
    failed: int
    failures: dict[str, int]
    failure_details: dict[str, str]
    duration_s: float
    prompt_tokens: list[int]
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    slo: SLO | None
    good: int | None
    goodput_requests_per_s: float | None
    ttft_ms: Percentiles
    itl_ms: Percentiles
    tpot_ms: Percentiles
    e2e_ms: Percentiles
    client: ClientFigures
    workers: WorkerFigures | None

    @classmethod
    def of(
        cls, driver: str, runs: Sequence[LoadRun], slo: SLO | None = None, workers: WorkerFigures | None = None
    ) -> LoadResult:
        """Totals over `runs`: their requests together, their durations added (rounds run one after another)."""
        outcomes, duration_s = [o for run in runs for o in run.outcomes], sum(run.duration_s for run in runs)
        good = [o for o in outcomes if o.failure is None]
        bad = [(o.failure, o.detail) for o in outcomes if o.failure is not None]
        output = sum(o.output_tokens for o in good)
        limits = slo if slo is not None and slo != SLO() else None
        met = None if limits is None else sum(o.meets(limits) for o in outcomes)
        ttft, itl = Percentiles.of([o.ttft for o in good]), Percentiles.of([gap for o in good for gap in o.itl])

        def rate(count: int) -> float:
            return round(count / duration_s, 3) if duration_s else 0.0

        return cls(
            driver=driver,
            requests=len(outcomes),
            failed=len(bad),
            failures={kind: sum(k == kind for k, _ in bad) for kind in sorted({k for k, _ in bad})},
            failure_details=dict(reversed(bad)),
            duration_s=round(duration_s, 3),
            prompt_tokens=[o.prompt_tokens for o in good],
            output_tokens=output,
            output_tokens_per_s=rate(output),
            requests_per_s=rate(len(good)),
            slo=limits,
            good=met,
            goodput_requests_per_s=None if met is None else rate(met),
            ttft_ms=ttft,
            itl_ms=itl,
            tpot_ms=Percentiles.of([(o.e2e - o.ttft) / (o.output_tokens - 1) for o in good if o.output_tokens > 1]),
            e2e_ms=Percentiles.of([o.e2e for o in good]),
            client=ClientFigures.of(runs, ttft.p50, itl.p50),
            workers=workers,
        )

    @classmethod
    def measure(
        cls, drive: Driver, driver: str, url: str, scenario: Scenario, workers: Workers | None = None
    ) -> LoadResult:
        """Run one load, and read the workers' counters after the warm-up and at the end."""
        before = workers.read() if workers else None
        if workers and before is not None and scenario.warmup:
            warm = drive(url, scenario.warming())
            workers.since(before, warm.answered)  # a transfer may be counted after its answer
            scenario, before = scenario.changed(warmup=0), workers.read()
        run = drive(url, scenario)
        counted = WorkerFigures.of(workers.since(before, run.answered)) if workers and before is not None else None
        return cls.of(driver, [run], scenario.slo, counted)
