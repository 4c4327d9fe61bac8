"""Rates read from load tests of a cluster whose rates are known, since it is simulated: what went in comes back."""

from __future__ import annotations

import numpy as np
import pytest

from pdtrim_deploy.loadtest import LoadResult, LoadRun, Outcome, Scenario, WorkerFigures
from pdtrim_deploy.loadtest.scenario import Lengths
from pdtrim_deploy.loadtest.schedule import jobs
from pdtrim_deploy.loadtest.workers import Histogram
from pdtrim_deploy.simulation import Cluster, Load, simulate
from pdtrim_deploy.sizing import Link, Rates

TRUE = Rates(
    prefill_tokens_per_s=1000.0,
    prefill_base_ms=12.0,
    decode_step_ms={1: 10.0, 4: 15.0, 8: 24.0},
    overhead_ms=30.0,
    transfer_ms=4.0,
    max_running=16,
)
LINK = Link(8e9)


def load_test(requests: int, clients: int, prompt: int, answer: int) -> LoadResult:
    """What `loadtest` would say of a closed loop on this cluster."""
    load = Load.of(tuple(jobs(Scenario.closed(requests, clients, (prompt,) * 2, (answer,) * 2))), clients=clients)
    simulated = simulate(Cluster(1, 1, TRUE, lambda tokens: 0, LINK), load)
    stamps = zip(simulated.arrived, simulated.first, simulated.done, strict=True)
    gap = [((done - first) / (answer - 1),) * (answer - 1) for _, first, done in stamps]
    outcomes = tuple(
        Outcome(None, "", first - arrived, itl, done - arrived, prompt, answer)
        for arrived, first, done, itl in zip(simulated.arrived, simulated.first, simulated.done, gap, strict=True)
    )
    forward = Histogram(
        count=requests, mean_ms=float((simulated.prefilled - simulated.begun).mean() * 1e3), p50_ms=None, p95_ms=None
    )
    transfer = Histogram(
        count=requests, mean_ms=float((simulated.landed - simulated.prefilled).mean() * 1e3), p50_ms=None, p95_ms=None
    )
    workers = WorkerFigures(
        requests=requests, outcomes={}, payload_bytes=0, wire_bytes=0, dense_bytes=0, transfer=transfer,
        queues={"prefill_forward": forward},
    )  # fmt: skip
    return LoadResult.of("builtin", [LoadRun(outcomes, simulated.duration_s)], None, workers)


@pytest.fixture(scope="module")
def fitted() -> Rates:
    loops = [(3, 1, 64, 8), (3, 1, 384, 8), (3, 1, 64, 48), (8, 2, 64, 48), (24, 4, 64, 48), (48, 8, 64, 48)]
    return Rates.measured([(str(loop), load_test(*loop)) for loop in loops], max_running=16)


def test_what_one_request_at_a_time_tells_is_exact(fitted: Rates) -> None:
    assert fitted.prefill_tokens_per_s == pytest.approx(1000)
    assert fitted.prefill_base_ms == pytest.approx(12)
    assert (fitted.overhead_ms, fitted.transfer_ms) == pytest.approx((30, 4))
    assert fitted.decode_step_ms[1] == pytest.approx(10)


def test_step_times_are_those_of_the_batches(fitted: Rates) -> None:
    true, estimate = TRUE.steps_s(), fitted.steps_s()
    for batch in (2, 4, 6):
        assert estimate[batch] == pytest.approx(true[batch], rel=0.2)  # medians of a synchronised loop


@pytest.mark.parametrize("rate", [1.0, 2.5])
def test_another_load_is_foretold(fitted: Rates, rate: float) -> None:
    load = Load.poisson(rate, 3000, Lengths(kind="uniform", low=96, high=352), Lengths(kind="uniform", low=12, high=60))
    true, foretold = (
        simulate(Cluster(1, 1, rates, lambda tokens: 0, LINK), load).figures() for rates in (TRUE, fitted)
    )
    for metric in ("ttft_ms", "itl_ms", "e2e_ms"):
        for share in ("p50", "p90", "p99"):
            expected = getattr(getattr(true, metric), share)
            assert getattr(getattr(foretold, metric), share) == pytest.approx(expected, rel=0.2), (metric, share)
    assert np.isfinite(foretold.prefill_busy)
