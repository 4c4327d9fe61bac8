"""What every load driver is asked for and gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class LoadSpec:
    """A closed loop: `concurrency` clients, each with one request in flight, until `requests` are done.

    Attributes:
        prompt_tokens, output_tokens: inclusive ranges that lengths are drawn from, by `seed`.
        warmup: requests before the clock starts; they count nowhere.
        deadline_s: per request, from its start to its last token.

    """

    requests: int = 32
    concurrency: int = 4
    prompt_tokens: tuple[int, int] = (320, 320)
    output_tokens: tuple[int, int] = (24, 24)
    warmup: int = 2
    deadline_s: float = 300.0
    seed: int = 0


class Percentiles(BaseModel):
    """Of one latency, in milliseconds; None when nothing was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, seconds: list[float]) -> Percentiles:
        """Percentiles (linear interpolation) of samples in seconds."""
        if not seconds:
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

    """

    failure: str | None = None
    detail: str = ""
    ttft: float = 0.0
    itl: tuple[float, ...] = ()
    e2e: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class LoadRun:
    """One load: every request's outcome, and the wall time from the first request to the last token."""

    outcomes: tuple[Outcome, ...]
    duration_s: float


class LoadResult(BaseModel):
    """Totals of a load; latencies cover successful requests only, failures are counted by kind.

    `tpot_ms` is (E2E - TTFT) / (output tokens - 1) per request; `itl_ms` is over all gaps of all requests, a chunk
    of k tokens counting as k equal gaps.
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
    ttft_ms: Percentiles
    itl_ms: Percentiles
    tpot_ms: Percentiles
    e2e_ms: Percentiles

    @classmethod
    def of(cls, driver: str, runs: Sequence[LoadRun]) -> LoadResult:
        """Totals over `runs`: their requests together, their durations added (rounds run one after another)."""
        outcomes, duration_s = [o for run in runs for o in run.outcomes], sum(run.duration_s for run in runs)
        good = [o for o in outcomes if o.failure is None]
        bad = [(o.failure, o.detail) for o in outcomes if o.failure is not None]
        output = sum(o.output_tokens for o in good)
        return cls(
            driver=driver,
            requests=len(outcomes),
            failed=len(bad),
            failures={kind: sum(k == kind for k, _ in bad) for kind in sorted({k for k, _ in bad})},
            failure_details=dict(reversed(bad)),
            duration_s=round(duration_s, 3),
            prompt_tokens=[o.prompt_tokens for o in good],
            output_tokens=output,
            output_tokens_per_s=round(output / duration_s, 3) if duration_s else 0.0,
            ttft_ms=Percentiles.of([o.ttft for o in good]),
            itl_ms=Percentiles.of([gap for o in good for gap in o.itl]),
            tpot_ms=Percentiles.of([(o.e2e - o.ttft) / (o.output_tokens - 1) for o in good if o.output_tokens > 1]),
            e2e_ms=Percentiles.of([o.e2e for o in good]),
        )


class Driver(Protocol):
    """Drives one load against the base URL of a router (`/generate` of SGLang)."""

    def __call__(self, url: str, spec: LoadSpec) -> LoadRun: ...
