"""The simulation against what is known of queues, and against itself written the slow way."""

from __future__ import annotations

import math
import time
from collections import deque
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.loadtest.scenario import SLO, Lengths, Scenario
from pdtrim_deploy.loadtest.schedule import jobs
from pdtrim_deploy.plan import Keep, KVSend, ModelShape, PDPlan
from pdtrim_deploy.simulation import Cluster, Load, simulate
from pdtrim_deploy.simulation.decode import DecodeWorker
from pdtrim_deploy.simulation.load import draws
from pdtrim_deploy.sizing import Link
from pdtrim_deploy.sizing.rates import Rates

FAST = Link(1e30)
RATES = Rates(prefill_tokens_per_s=1000.0, decode_step_ms={1: 10.0, 8: 24.0}, max_running=8)
MIXED = (Lengths(kind="uniform", low=1, high=300), Lengths(kind="uniform", low=1, high=40))


def nothing(tokens: int) -> int:
    return 0


def test_a_request_alone_takes_the_sum_of_its_parts() -> None:
    rates = RATES.model_copy(update={"prefill_base_ms": 7.0, "overhead_ms": 30.0, "transfer_ms": 2.0})
    cluster = Cluster(1, 1, rates, lambda tokens: 1000 * tokens, Link(8e6))
    load = Load(np.array([0.0, 50.0]), np.array([100, 400]), np.array([5, 1]))
    simulated = simulate(cluster, load)
    for n, (isl, osl) in enumerate(((100, 5), (400, 1))):
        ttft = 0.030 + 0.007 + isl / 1000 + 1000 * isl * 8 / 8e6 + 0.002
        assert simulated.first[n] - simulated.arrived[n] == pytest.approx(ttft)
        assert simulated.done[n] - simulated.first[n] == pytest.approx((osl - 1) * 0.010)


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.8])
def test_waits_at_prefill_are_those_of_the_md1_queue(utilisation: float) -> None:
    service = 0.1
    rates = RATES.model_copy(update={"chunk_tokens": 100})  # a batch is one prompt
    load = Load.poisson(utilisation / service, 30_000, Lengths(tokens=100), Lengths(tokens=1), seed=1)
    simulated = simulate(Cluster(1, 1, rates, nothing, FAST), load)
    waits = simulated.begun - simulated.arrived
    assert waits.mean() == pytest.approx(utilisation * service / 2 / (1 - utilisation), rel=0.05)
    assert (waits == 0).mean() == pytest.approx(1 - utilisation, abs=0.01)


def test_a_single_queue_is_lindleys_recursion() -> None:
    load = Load.poisson(6.0, 600, MIXED[0], Lengths(tokens=1), seed=2)
    rates = RATES.model_copy(update={"chunk_tokens": 1, "prefill_base_ms": 0.0})  # a token a batch: no batching
    simulated = simulate(Cluster(1, 1, rates, nothing, FAST), load)
    end, expected = 0.0, []
    for due, isl in zip(load.due, load.isl, strict=True):
        end = max(end, due) + isl / 1000
        expected.append(end)
    assert simulated.prefilled == pytest.approx(np.array(expected))


def test_nothing_is_lost_or_computed_twice() -> None:
    load = Load.poisson(20.0, 4000, *MIXED, seed=3)
    simulated = simulate(Cluster(3, 5, RATES, lambda tokens: 64 * tokens, Link(1e6)), load)
    assert simulated.gaps[:, 1].sum() == (load.osl - 1).sum()  # every token but the first follows a gap
    assert simulated.prefill_busy_s * 3 == pytest.approx(load.isl.sum() / 1000)
    assert simulated.link_bytes == 64 * load.isl.sum()
    assert simulated.link_busy_s == pytest.approx(8 * 64 * load.isl.sum() / 1e6)
    order = (
        simulated.arrived,
        simulated.ready,
        simulated.begun,
        simulated.prefilled,
        simulated.landed,
        simulated.first,
        simulated.done,
    )
    for earlier, later in pairwise(order):
        assert (later >= earlier).all()


def test_littles_law_between_what_requests_saw_and_what_workers_did() -> None:
    """Requests' time in decode, from their stamps, is the integral of the batches' sizes, from the workers' runs."""
    load = Load.poisson(10.0, 5000, *MIXED, seed=4)
    simulated = simulate(Cluster(4, 3, RATES, nothing, FAST), load)
    integral = (simulated.gaps[:, 0] * simulated.gaps[:, 1]).sum()
    assert (simulated.done - simulated.first).sum() == pytest.approx(integral)


def test_the_bytes_are_the_plans() -> None:
    shape = ModelShape(architecture="X", fingerprint="f", num_blocks=3, num_kv_heads=2, head_dim=8, kv_dtype="float32")
    sparse = KVSend(mode="sparse", n_first=4, n_last=60)
    plan = PDPlan(model=shape, prefill=(Keep(),) * 3, decode=(Keep(),) * 3, kv=(KVSend(), sparse, sparse))
    load = Load.poisson(5.0, 500, *MIXED, seed=5)
    simulated = simulate(Cluster(2, 2, RATES, plan.payload_bytes, Link(1e9)), load)
    assert simulated.link_bytes == sum(plan.payload_bytes(int(n)) for n in load.isl)


def test_a_full_link_is_the_bottleneck_and_carries_its_speed() -> None:
    load = Load.poisson(100.0, 2000, Lengths(tokens=100), Lengths(tokens=2), seed=6)
    simulated = simulate(Cluster(20, 20, RATES, lambda tokens: 10_000, Link(8 * 10_000 * 10.0)), load)
    figures = simulated.figures()
    assert figures.requests_per_s == pytest.approx(10.0, rel=0.01)  # 10 requests/s fit
    assert figures.link_busy == pytest.approx(1.0, abs=0.01)
    each = simulate(Cluster(20, 20, RATES, lambda tokens: 10_000, Link(8 * 10_000 * 10.0), link_each=True), load)
    assert each.figures().requests_per_s > 90


def test_a_pool_holds_no_more_than_it_has() -> None:
    rates = RATES.model_copy(update={"pool_tokens": 250})
    load = Load.poisson(50.0, 300, Lengths(tokens=90), Lengths(tokens=10), seed=7)  # two requests fit
    simulated = simulate(Cluster(4, 1, rates, nothing, FAST), load)
    moments = np.concatenate([simulated.ready, simulated.done])
    inside = np.concatenate([np.ones(300), -np.ones(300)])
    # At equal times one leaves before the next enters.
    assert np.cumsum(inside[np.lexsort((inside, moments.round(9)))]).max() == 2
    with pytest.raises(UserError, match="a request has 300 tokens, a decode worker's pool_tokens are 250"):
        simulate(Cluster(1, 1, rates, nothing, FAST), Load(np.zeros(1), np.array([290]), np.array([10])))


def test_chunks_let_short_prompts_through() -> None:
    rates = RATES.model_copy(update={"chunk_tokens": 100, "prefill_base_ms": 5.0})
    load = Load(np.array([0.0, 0.001, 0.002]), np.array([350, 30, 20]), np.array([1, 1, 1]))
    simulated = simulate(Cluster(1, 1, rates, nothing, FAST), load)
    # Three chunks of 100; the last 50 share a batch with both short prompts.
    assert simulated.prefilled == pytest.approx([3 * 0.105 + 0.105] * 3)
    assert simulated.begun == pytest.approx([0.0, 3 * 0.105, 3 * 0.105])
    assert rates.alone_s(350) == pytest.approx(4 * 0.005 + 0.350)


def test_a_closed_loop_keeps_its_clients_busy() -> None:
    scenario = Scenario.closed(40, 3, (50, 90), (2, 9), warmup=0)
    load = Load.of(tuple(jobs(scenario)), clients=3)
    simulated = simulate(Cluster(1, 1, RATES, nothing, FAST), load)
    assert (simulated.done > 0).all()
    moments, sign = np.concatenate([simulated.arrived, simulated.done]), np.concatenate([np.ones(40), -np.ones(40)])
    inside = np.cumsum(sign[np.lexsort((sign, moments))])
    assert inside.max() == 3
    assert sorted(simulated.arrived[3:]) == sorted(simulated.done)[:-3]  # the next one is sent when one is done
    figures = simulated.figures(SLO(ttft_ms=1e9, itl_ms=1e9))
    assert figures.requests_per_s * figures.duration_s == pytest.approx(40)
    assert figures.good_share == 1.0


def test_goodput_counts_what_the_slo_allows() -> None:
    load = Load.poisson(3.0, 2000, *MIXED, seed=8)
    simulated = simulate(Cluster(1, 1, RATES, nothing, FAST), load)
    half = simulated.figures().ttft_ms.p50
    assert simulated.figures(SLO(ttft_ms=half)).good_share == pytest.approx(0.5, abs=0.01)
    assert simulated.figures(SLO(itl_ms=10.0001)).good_share == pytest.approx(
        ((simulated.done - simulated.first) / np.maximum(1, load.osl - 1) <= 0.0100001).mean()
    )
    assert simulated.figures().good_share is None


def test_equal_seeds_are_equal_and_others_are_not() -> None:
    both = [simulate(Cluster(2, 2, RATES, nothing, FAST), Load.poisson(9.0, 500, *MIXED, seed=1)) for _ in range(2)]
    assert (both[0].done == both[1].done).all()
    other = simulate(Cluster(2, 2, RATES, nothing, FAST), Load.poisson(9.0, 500, *MIXED, seed=2))
    assert (both[0].done != other.done).all()


def slow_decode(steps_s: list[float], landings: list[tuple[float, int]]) -> tuple[dict[int, float], dict[int, float]]:
    """One step at a time: first and last token of each request, which lands at a time with so many tokens to answer."""
    coming, waiting = deque(sorted((at, n, osl) for n, (at, osl) in enumerate(landings))), deque()
    active: dict[int, int] = {}
    first: dict[int, float] = {}
    done: dict[int, float] = {}
    now, room = 0.0, len(steps_s) - 1
    while coming or waiting or active:
        if not waiting and not active:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now + 1e-12:
            waiting.append(coming.popleft()[1:])
        while waiting and len(active) < room:
            n, osl = waiting.popleft()
            first[n] = now
            if osl == 1:
                done[n] = now
            else:
                active[n] = osl - 1
        if active:
            now += steps_s[len(active)]
            for n in [n for n in active if active[n] == 1]:
                done[n] = now
                del active[n]
            active = {n: left - 1 for n, left in active.items()}
    return first, done


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 2).map(lambda t: round(t, 4) + 1e-5), st.integers(1, 30)), min_size=1, max_size=25),
    st.integers(1, 4),
)
def test_runs_of_steps_are_steps_one_by_one(landings: list[tuple[float, int]], room: int) -> None:
    steps = [0.0, 0.0101, 0.0203, 0.0307, 0.0411][: room + 1]
    # Off the grid of the steps, each by another amount: at a tie with a step's end either order is right.
    landings = [(at + 1e-6 * n, osl) for n, (at, osl) in enumerate(sorted(landings))]
    first, done = slow_decode(steps, landings)
    worker, now = DecodeWorker(steps, math.inf), 0.0
    seen_first: dict[int, float] = {}
    seen_done: dict[int, float] = {}
    answer = [osl for _, osl in landings]
    coming = deque((at, n) for n, (at, _) in enumerate(landings))
    while coming or worker.next_at < math.inf:
        if coming and coming[0][0] <= worker.next_at:
            now, n = coming.popleft()
            worker.land(n, now)
        else:
            now = worker.next_at
            joined, ended = worker.change(now, answer)
            seen_first |= dict.fromkeys(joined, now)
            seen_done |= dict.fromkeys(ended, now)
    assert seen_first == pytest.approx(first)
    assert seen_done == pytest.approx(done)


def test_lengths_have_the_distribution_asked_for() -> None:
    rng = np.random.default_rng(0)
    normal = draws(Lengths(kind="normal", tokens=200, spread=30, low=150, high=300), 20_000, rng)
    assert (normal.min(), abs(np.median(normal) - 200) < 1, normal.max() <= 300) == (150, True, True)
    logs = np.log(draws(Lengths(kind="lognormal", tokens=500, spread=0.5), 20_000, rng))
    assert np.median(logs) == pytest.approx(math.log(500), abs=0.02)
    assert logs.std() == pytest.approx(0.5, abs=0.02)


def test_a_large_cluster_is_simulated_in_seconds() -> None:
    rates = RATES.model_copy(update={"prefill_tokens_per_s": 20_000.0, "max_running": 64})
    load = Load.poisson(60.0, 10_000, Lengths(tokens=2000), Lengths(kind="uniform", low=50, high=250), seed=0)
    started = time.process_time()
    simulated = simulate(Cluster(16, 48, rates, nothing, FAST), load)
    assert time.process_time() - started < 8  # 1 s on a quiet core
    assert simulated.figures().requests_per_s == pytest.approx(60, rel=0.1)
