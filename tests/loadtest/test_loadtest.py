import sys
from pathlib import Path

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.loadtest import LoadResult, LoadRun, LoadSpec, Outcome, check_target, driver
from pdtrim_deploy.loadtest.base import Percentiles

sys.path.insert(0, str(Path(__file__).parent))
from sse_server import Behaviour, serve

SPEC = LoadSpec(requests=8, concurrency=2, prompt_tokens=(5, 9), output_tokens=(6, 6), warmup=1, deadline_s=10)


def load(behaviour: Behaviour, spec: LoadSpec = SPEC) -> LoadResult:
    with serve(behaviour) as url:
        return LoadResult.of("builtin", [driver("builtin")(url, spec)])


def test_latencies_are_those_of_the_server() -> None:
    behaviour = Behaviour(ttft=0.12, itl=0.03)
    result = load(behaviour)
    assert (result.requests, result.failed, result.output_tokens) == (8, 0, 48)
    # Never early; late by what a busy machine costs.
    assert 120 <= result.ttft_ms.p50 < 160
    assert 30 <= result.itl_ms.p50 < 45
    assert 30 <= result.tpot_ms.p50 < 45
    assert 120 + 5 * 30 <= result.e2e_ms.p50 < 350
    assert result.duration_s >= 4 * 0.27
    assert result.output_tokens_per_s == pytest.approx(48 / result.duration_s, rel=1e-2)
    assert behaviour.most_in_flight == 2
    assert len(behaviour.bodies) == 9


def test_a_chunk_of_several_tokens_counts_as_equal_gaps() -> None:
    result = load(Behaviour(ttft=0.05, itl=0.09, chunk=3))
    assert result.output_tokens == 48
    assert 30 <= result.itl_ms.p90 < 45
    assert result.itl_ms.p50 < 45


def test_lengths_and_texts_come_from_the_seed() -> None:
    seen = [Behaviour(ttft=0, itl=0) for _ in range(3)]
    spec = LoadSpec(requests=6, concurrency=1, prompt_tokens=(3, 40), output_tokens=(1, 9), warmup=0)
    for behaviour, seed in zip(seen, (0, 0, 1), strict=True):
        load(behaviour, LoadSpec(**{**vars(spec), "seed": seed}))
    assert seen[0].bodies == seen[1].bodies
    assert seen[0].bodies != seen[2].bodies
    lengths = [len(body["text"].split()) for body in seen[0].bodies]
    assert len(set(lengths)) > 1
    assert all(3 <= n <= 40 for n in lengths)


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (Behaviour(status=503), "http_503"),
        (Behaviour(lose=2), "truncated"),
        (Behaviour(silent=True), "truncated"),
        (Behaviour(error_event=True), "error"),
        (Behaviour(garbage=True), "error"),
        (Behaviour(hang=True), "timeout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_failures_are_counted_by_kind_and_leave_no_latency(behaviour: Behaviour, kind: str) -> None:
    spec = LoadSpec(requests=2, concurrency=2, output_tokens=(6, 6), warmup=0, deadline_s=0.5)
    result = load(behaviour, spec)
    assert (result.failed, result.failures) == (2, {kind: 2})
    assert result.failure_details[kind]
    assert result.ttft_ms.p50 is None
    assert result.output_tokens == 0


def test_nobody_listens() -> None:
    with serve(Behaviour()) as url:
        pass
    assert LoadResult.of("builtin", [driver("builtin")(url, SPEC)]).failures == {"refused": 8}


def test_rounds_add_up() -> None:
    ok = Outcome(ttft=0.1, itl=(0.1, 0.3), e2e=0.5, prompt_tokens=7, output_tokens=3)
    result = LoadResult.of("x", [LoadRun((ok, Outcome("timeout", "late")), 2.0), LoadRun((ok,), 1.0)])
    assert (result.requests, result.failed, result.duration_s, result.prompt_tokens) == (3, 1, 3.0, [7, 7])
    assert result.output_tokens_per_s == 2.0
    assert result.tpot_ms.p50 == pytest.approx(200)
    assert result.itl_ms.p50 == pytest.approx(200)


def test_percentiles_of_nothing_and_of_a_ramp() -> None:
    assert Percentiles.of([]).p99 is None
    ramp = Percentiles.of([n / 1000 for n in range(101)])
    assert (ramp.p50, ramp.p90, ramp.p95, ramp.p99) == (50, 90, 95, 99)


@pytest.mark.parametrize("url", ["http://127.0.0.1:80", "http://[::1]:80", "http://localhost:1"])
def test_this_machine_may_be_loaded(url: str) -> None:
    check_target(url, allow_remote=False)


@pytest.mark.parametrize("url", ["http://10.0.0.1:80", "https://example.org", "ftp://127.0.0.1", "127.0.0.1:80"])
def test_other_targets_are_refused(url: str) -> None:
    with pytest.raises(UserError):
        check_target(url, allow_remote=False)


def test_other_machines_when_told() -> None:
    check_target("http://10.0.0.1:80", allow_remote=True)


def test_an_unknown_driver_is_told_the_names() -> None:
    with pytest.raises(UserError, match="allowed: builtin"):
        driver("wrk")
