import asyncio
import operator
import sys
import time
from pathlib import Path

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.loadtest import LoadResult, LoadRun, Outcome, Scenario, check_target, driver
from pdtrim_deploy.loadtest.base import Percentiles
from pdtrim_deploy.loadtest.builtin import _watch
from pdtrim_deploy.loadtest.scenario import SLO, Arrivals, Conversations, Lengths

sys.path.insert(0, str(Path(__file__).parent))
from sse_server import Behaviour, serve, slower

SPEC = Scenario.closed(8, 2, (5, 9), (6, 6), warmup=1, deadline_s=120.0)


def load(behaviour: Behaviour, spec: Scenario = SPEC) -> LoadResult:
    with serve(behaviour) as url:
        return LoadResult.of("builtin", [driver("builtin")(url, spec)])


def test_latencies_are_those_of_the_server() -> None:
    for factor in slower():
        behaviour = Behaviour(ttft=0.12 * factor, itl=0.03 * factor)
        result = load(behaviour)
        assert (result.requests, result.failed, result.output_tokens) == (8, 0, 48)
        figures = (result.ttft_ms.p50, result.itl_ms.p50, result.tpot_ms.p50, result.e2e_ms.p50)
        seen = [(figure or 0) / factor for figure in figures]
        assert all(map(operator.ge, seen, (120, 30, 30, 120 + 5 * 30))), "never early"
        assert result.duration_s >= 4 * 0.27 * factor
        assert result.output_tokens_per_s == pytest.approx(48 / result.duration_s, rel=1e-2)
        assert behaviour.most_in_flight == 2
        assert len(behaviour.bodies) == 9
        if in_time := all(map(operator.lt, seen, (160, 45, 45, 350))):
            break
    assert in_time, seen


def test_a_chunk_of_several_tokens_counts_as_equal_gaps() -> None:
    for factor in slower():
        result = load(Behaviour(ttft=0.05, itl=0.09 * factor, chunk=3))
        assert result.output_tokens == 48
        seen = [(result.itl_ms.p50 or 0) / factor, (result.itl_ms.p90 or 0) / factor]
        assert seen[1] >= 30
        if in_time := max(seen) < 45:
            break
    assert in_time, seen


def test_an_answer_may_hold_what_ends_a_line_elsewhere() -> None:
    """In JSON as SGLang writes it these stand as they are; only a line feed ends a line of an event stream."""
    assert load(Behaviour(ttft=0, itl=0, text="a\u2028b\u0085c\u2029")).failures == {}


@pytest.mark.parametrize("arrivals", [Arrivals(clients=2), Arrivals(kind="constant", rate=50.0)])
def test_a_turn_holds_all_that_was_said_before_it(arrivals: Arrivals) -> None:
    behaviour = Behaviour(ttft=0.01, itl=0, text=" answer")
    spec = SPEC.changed(arrivals=arrivals, conversations=Conversations(turns=3), requests=6, warmup=0)
    with serve(behaviour) as url:
        outcomes = driver("builtin")(url, spec).outcomes
    assert sorted(outcome.turn for outcome in outcomes) == [0, 0, 1, 1, 2, 2]
    texts = sorted(body["text"] for body in behaviour.bodies)  # each behind those that it begins with
    for first, second, third in (texts[:3], texts[3:]):
        assert second.startswith(f"{first} answer ")
        assert third.startswith(f"{second} answer ")
        assert len(third.split()) - len(second.split()) > 5


def test_a_conversation_ends_with_the_turn_that_fails() -> None:
    result = load(Behaviour(ttft=0, itl=0, lose=2), SPEC.changed(conversations=Conversations(turns=4)))
    assert result.failures == {"truncated": 2}


def test_lengths_and_texts_come_from_the_seed() -> None:
    seen = [Behaviour(ttft=0, itl=0) for _ in range(3)]
    spec = Scenario.closed(6, 1, (3, 40), (1, 9), warmup=0)
    for behaviour, seed in zip(seen, (0, 0, 1), strict=True):
        load(behaviour, spec.changed(seed=seed))
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
        (Behaviour(encoding="gzip"), "error"),  # which it is not
        (Behaviour(finish_reason="length"), "error"),
        (Behaviour(hang=True), "timeout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_failures_are_counted_by_kind_and_leave_no_latency(behaviour: Behaviour, kind: str) -> None:
    spec = Scenario.closed(2, 2, output=(6, 6), warmup=0, deadline_s=0.5 if kind == "timeout" else 60.0)
    result = load(behaviour, spec)
    assert (result.failed, result.failures) == (2, {kind: 2})
    assert result.failure_details[kind]
    assert result.ttft_ms.p50 is None
    assert result.output_tokens == 0


def test_nobody_listens() -> None:
    with serve(Behaviour()) as url:
        pass
    assert LoadResult.of("builtin", [driver("builtin")(url, SPEC)]).failures == {"refused": 8}


def test_open_loops_send_whatever_the_server_does() -> None:
    behaviour = Behaviour(ttft=2.0, itl=0.0)
    arrivals = Arrivals(kind="constant", rate=20.0)
    spec = Scenario(
        name="a", arrivals=arrivals, input=Lengths(tokens=4), output=Lengths(tokens=2), requests=10, warmup=0
    )
    result = load(behaviour, spec)
    assert (result.requests, result.failed) == (10, 0)
    assert behaviour.most_in_flight >= 8
    assert 0.45 + 2.0 <= result.duration_s < 10 * 2.0, "as one after the other"


def test_a_closed_loop_ends_with_its_duration() -> None:
    arrivals = Arrivals(clients=2)
    for factor in slower():
        spec = Scenario(
            name="a", arrivals=arrivals, input=Lengths(tokens=4), output=Lengths(tokens=2), duration_s=0.5 * factor,
            warmup=0,
        )  # fmt: skip
        result = load(Behaviour(ttft=0.1 * factor, itl=0.0), spec)
        assert result.requests <= 10
        assert result.duration_s >= 0.5 * factor
        if in_time := result.requests >= 4 and result.duration_s < 0.8 * factor:
            break
    assert in_time, (result.requests, result.duration_s)


@pytest.mark.parametrize("arrivals", [Arrivals(clients=2), Arrivals(kind="constant", rate=10.0)])
def test_no_turn_of_a_conversation_is_sent_after_the_duration(arrivals: Arrivals) -> None:
    """A conversation of 20 turns would go on for 2 s."""
    spec = SPEC.changed(arrivals=arrivals, conversations=Conversations(turns=20), requests=None, warmup=0)
    behaviour = Behaviour(ttft=0.1, itl=0.0)
    with serve(behaviour) as url:
        started = time.perf_counter()
        run = driver("builtin")(url, spec.changed(duration_s=0.5))
    took = time.perf_counter() - started
    assert {outcome.failure for outcome in run.outcomes} == {None}
    assert max(outcome.turn for outcome in run.outcomes) <= 5, "turns of 0.1 s each, sent within 0.5 s"
    assert 0.5 <= run.duration_s <= took, "until the last answer"
    assert len(behaviour.bodies) == len(run.outcomes)


def outcome(ttft: float, itl: float, late: float = 0.0) -> Outcome:
    return Outcome(ttft=ttft, itl=(itl, itl), e2e=ttft + 2 * itl, prompt_tokens=4, output_tokens=3, late=late)


def test_goodput_counts_requests_within_both_limits() -> None:
    outcomes = (outcome(0.1, 0.02), outcome(0.3, 0.02), outcome(0.1, 0.05), Outcome("timeout", "late"))
    for slo, good in ((SLO(ttft_ms=200), 2), (SLO(itl_ms=30), 2), (SLO(ttft_ms=200, itl_ms=30), 1)):
        result = LoadResult.of("x", [LoadRun(outcomes, 2.0)], slo)
        assert (result.good, result.goodput_requests_per_s) == (good, good / 2)
    assert LoadResult.of("x", [LoadRun(outcomes, 2.0)], SLO()).good is None


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (LoadRun((outcome(0.1, 0.02),), 2.0, cpu_s=1.9), "it used 0.95 of the one core"),
        (LoadRun((Outcome("refused", "x"),), 0.01, cpu_s=0.01), None),  # over before it says anything
        (LoadRun((outcome(0.1, 0.02, late=0.5),), 2.0), "p95 of requests were sent 500 ms late"),
        (LoadRun((outcome(0.1, 0.02),), 2.0, pauses=(0.06,) * 10), "it woke 60 ms late at p95"),
        (LoadRun((outcome(0.1, 0.02, late=0.005),), 2.0, cpu_s=0.5, pauses=(0.005,) * 10), None),
    ],
)
def test_the_client_says_when_it_was_the_bottleneck(run: LoadRun, says: str | None) -> None:
    bottleneck = LoadResult.of("x", [run]).client.bottleneck
    assert bottleneck is None if says is None else says in (bottleneck or "")


def test_a_client_without_its_processor_notices() -> None:
    """The event loop is held up for real, as by a busy machine."""

    async def busy() -> list[float]:
        pauses: list[float] = []
        watch = asyncio.create_task(_watch(pauses))
        for _ in range(4):
            await asyncio.sleep(0.03)
            time.sleep(0.1)
        watch.cancel()
        return pauses

    assert max(asyncio.run(busy())) > 0.05


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


@pytest.mark.parametrize(
    "url",
    [
        *("http://10.0.0.1:80", "https://example.org", "ftp://127.0.0.1", "127.0.0.1:80"),
        *("http://[", "http://127.0.0.1:99999999", "http://127.0.0.1:x"),
        *(" http://127.0.0.1:80", "http://127.0.0.1:80/\n", "http://127.0.0.1:80/\x01", "http://127.0.0.1:80/\udcff"),
    ],
)
def test_other_targets_are_refused(url: str) -> None:
    with pytest.raises(UserError) as refused:
        check_target(url, allow_remote=False)
    assert str(refused.value).isprintable()


def test_other_machines_when_told() -> None:
    check_target("http://10.0.0.1:80", allow_remote=True)


def test_an_unknown_driver_is_told_the_names() -> None:
    with pytest.raises(UserError, match="allowed: aiperf, builtin"):
        driver("wrk")
