"""Rounds in turns: every pair gets the same load; ratios show a known difference, and none between equal pairs."""

import sys
from pathlib import Path

import numpy as np
import pytest

from pdtrim_deploy.errors import ServingError, UserError
from pdtrim_deploy.loadtest import LoadResult, LoadRun, Outcome, Scenario, driver
from pdtrim_deploy.loadtest.rounds import Comparison, Ratio, Side, check_rounds, interleave, repeats, shares
from pdtrim_deploy.loadtest.scenario import SLO
from pdtrim_deploy.loadtest.workers import Key, WorkerFigures, Workers, _quantile
from pdtrim_deploy.local.student_t import t_975
from pdtrim_deploy.serving import metrics

sys.path.insert(0, str(Path(__file__).parent))
from sse_server import Behaviour, serve, slower

SCENARIO = Scenario.closed(6, 2, (4, 12), (4, 4), warmup=1)


def test_both_sides_get_the_same_load_in_changing_order() -> None:
    seen: list[tuple[str, int, int]] = []

    def drive(url: str, scenario: Scenario) -> LoadRun:
        seen.append((url, scenario.seed, scenario.requests or 0))
        return LoadRun((Outcome(ttft=0.2 if url == "b" else 0.1, itl=(0.1,), e2e=0.3, output_tokens=2),), 1.0)

    rounds = interleave({"a": Side("a"), "b": Side("b")}, repeats(SCENARIO, 3), drive, "x")
    assert [url for url, *_ in seen] == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert {(seed, n) for url, seed, n in seen[2:] if url == "a"} == {(0, 6), (1, 6), (2, 6)}
    assert [row[1:] for row in seen if row[0] == "a"] == [row[1:] for row in seen if row[0] == "b"]
    ratios = {ratio.figure: ratio for ratio in rounds.ratios("a", "b")}
    assert ratios["TTFT p50"].rounds == (2.0, 2.0, 2.0)
    assert ratios["TTFT p50"].ratio == pytest.approx(2)
    assert ratios["TTFT p50"].differs
    assert not ratios["ITL p50"].differs
    assert "goodput/s" not in ratios
    assert (rounds.total["a"].requests, rounds.total["a"].duration_s) == (3, 3.0)


def test_a_figure_that_a_round_lacks_is_named() -> None:
    def drive(url: str, scenario: Scenario) -> LoadRun:
        ttft = 0.5 if (url, scenario.seed) == ("b", 1) else 0.1
        return LoadRun((Outcome(ttft=ttft, itl=(0.1,), e2e=1.0, output_tokens=2),), 1.0)

    rounds = repeats(SCENARIO.changed(slo=SLO(ttft_ms=200)), 3)
    results = interleave({"a": Side("a"), "b": Side("b")}, rounds, drive, "x")
    assert "goodput/s" not in {ratio.figure for ratio in results.ratios("a", "b")}
    assert results.dropped("a", "b") == ["goodput/s has no ratio: it is 0 or missing in 1 of 3 rounds"]
    compared = Comparison(
        first="a", second="b", scenario={}, rounds=3, ratios=(), dropped=tuple(results.dropped("a", "b")),
        load=results.total, environment={},
    )  # fmt: skip
    assert compared.problems == results.dropped("a", "b")


def test_a_slower_server_is_found_slower() -> None:
    for factor in slower():
        first, second = (Behaviour(ttft=0.03, itl=gap * factor) for gap in (0.02, 0.04))
        with serve(first) as fast, serve(second) as slow:
            sides = {"fast": Side(fast), "slow": Side(slow)}
            rounds = interleave(sides, repeats(SCENARIO, 4), driver("builtin"), "builtin")
        itl = next(ratio for ratio in rounds.ratios("fast", "slow") if ratio.figure == "ITL p50")
        if told_apart := 1.5 < itl.ratio < 2.2 and itl.differs:
            break
    assert told_apart, itl


def test_requests_are_dealt_out_without_loss() -> None:
    dealt = shares(Scenario.closed(11), 4)
    assert [scenario.requests for scenario in dealt] == [3, 3, 3, 2]
    assert [scenario.seed for scenario in dealt] == [0, 1, 2, 3]
    assert len(shares(Scenario.closed(2), 4)) == 2


@pytest.mark.parametrize("rounds", [3, 6, 20])
def test_the_interval_covers_the_truth_as_often_as_it_says(rounds: int) -> None:
    rng = np.random.default_rng(rounds)
    ratios = np.exp(np.log(0.9) + 0.2 * rng.standard_normal((2000, rounds)))
    computed = [Ratio.of("x", row) for row in ratios.tolist()]
    assert np.mean([ratio.low <= 0.9 <= ratio.high for ratio in computed]) == pytest.approx(0.95, abs=0.015)


def test_quantiles_of_t() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (*range(1, 31), 35, 60, 200):
        assert t_975(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(UserError, match="--rounds 2 gives no confidence interval; use at least 3"):
        check_rounds(2)
    check_rounds(3)


def test_what_workers_counted() -> None:
    seconds, stage = "pdtrim_kv_transfer_seconds", "sglang:per_stage_req_latency_seconds"
    added = {
        ("pdtrim_kv_payload_bytes_sum", ""): 400.0,
        ("pdtrim_kv_payload_bytes_count", ""): 4.0,
        ("pdtrim_kv_early_bytes_sum", ""): 100.0,
        ("pdtrim_kv_requests_total", "success"): 4.0,
        ("pdtrim_kv_requests_total", "failed"): 0.0,
        (f"{seconds}_count", ""): 4.0,
        (f"{seconds}_sum", ""): 2.0,
        (f"{seconds}_bucket", "0.5"): 2.0,
        (f"{seconds}_bucket", "1.0"): 4.0,
        (f"{seconds}_bucket", "+Inf"): 4.0,
        (f"{stage}_count", "decode_waiting"): 2.0,
        (f"{stage}_sum", "decode_waiting"): 1.0,
        (f"{stage}_bucket", "decode_waiting:0.1"): 2.0,
    }
    figures = WorkerFigures.of(added)
    assert (figures.requests, figures.payload_bytes, figures.early_bytes) == (4, 400, 100)
    assert figures.outcomes == {"success": 4}
    assert figures.transfer is not None
    assert (figures.transfer.mean_ms, figures.transfer.p50_ms, figures.transfer.p95_ms) == (500, 500, 950)
    assert list(figures.queues) == ["decode_waiting"]
    assert figures.queues["decode_waiting"].mean_ms == 500


def exposition(kind: str, count: int, seconds: float) -> str:
    """A worker's queue metrics as SGLang writes them."""
    name, labels = "sglang:queue_time_seconds", f'engine_type="{kind}",model_name="m",pp_rank="0",tp_rank="0"'
    buckets = "".join(f'{name}_bucket{{{labels},le="{le}"}} {count}\n' for le in ("10.0", "+Inf"))
    ends = f"{name}_sum{{{labels}}} {seconds}\n{name}_count{{{labels}}} {count}\n"
    return f"# TYPE {name} histogram\n{buckets}{ends}"


def test_the_queues_of_prefill_and_decode_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"p": exposition("prefill", 2, 4.0), "q": exposition("prefill", 2, 0.0), "d": exposition("decode", 4, 0.4)}
    monkeypatch.setattr(metrics, "scrape", lambda url: metrics.parse(texts[url]))
    queues = WorkerFigures.of(Workers(tuple(texts)).since({}, 0)).queues
    assert {name: (histogram.count, histogram.mean_ms) for name, histogram in queues.items()} == {
        "prefill_queue": (4, 1000),
        "decode_queue": (4, 100),
    }


def test_transfers_of_the_warm_up_that_are_counted_late_are_none_of_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker counts a transfer when its last rows are acknowledged, which may be after the answer."""
    sent, counted = list[int](), list[int]()  # bytes of each transfer; a scrape sees one more of those that were sent

    def read(workers: Workers) -> dict[tuple[str, str], float]:
        counted.extend(sent[len(counted) : len(counted) + 1])
        names = {"pdtrim_kv_payload_bytes_count": len(counted), "pdtrim_kv_payload_bytes_sum": sum(counted)}
        return {(name, ""): float(value) for name, value in names.items()}

    def drive(url: str, scenario: Scenario) -> LoadRun:
        sent.extend([10 if sent else 1] * (scenario.requests or 0))
        return LoadRun((Outcome(),) * (scenario.requests or 0), 1.0)

    monkeypatch.setattr(Workers, "read", read)
    load = Scenario.closed(4, 1, warmup=3)
    result = LoadResult.measure(drive, "d", "u", load, Workers(("m",)))
    assert result.workers is not None
    assert (result.workers.requests, result.workers.payload_bytes) == (4, 40)


def test_a_worker_that_says_no_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "get", lambda url, timeout_s: "<html>hello</html>")
    with pytest.raises(ServingError, match=r"u/metrics does not return Prometheus metrics .*; give a worker's URL"):
        Workers(("u/metrics",)).read()


def test_totals_leave_out_what_was_counted_between_rounds() -> None:
    served = {"a": 0, "b": 0}

    class Counting(Workers):
        def read(self) -> dict[Key, float]:
            name = self.urls[0]
            count = float(served[name])
            kv = "pdtrim_kv_payload_bytes"
            queue = "sglang:queue_time_seconds"
            return {
                (f"{kv}_count", ""): count,
                (f"{kv}_sum", ""): count,
                (f"{queue}_count", "prefill"): count,
                (f"{queue}_sum", "prefill"): count,
            }

    def drive(url: str, scenario: Scenario) -> LoadRun:
        served[url] += 1
        served["b" if url == "a" else "a"] += 5  # health checks of the pair that is not under load
        return LoadRun((Outcome(ttft=0.1, e2e=0.1, output_tokens=1),), 1.0)

    sides = {name: Side(name, Counting((name,))) for name in served}
    rounds = interleave(sides, repeats(SCENARIO, 3), drive, "x")
    for name in served:
        counted = rounds.total[name].workers
        assert counted is not None
        assert (counted.requests, counted.payload_bytes, counted.queues["prefill_queue"].count) == (3, 3, 3)


def test_quantiles_without_an_upper_bound_are_not_guessed() -> None:
    assert _quantile([(1.0, 1.0), (float("inf"), 10.0)], 0.5) is None
    assert _quantile([], 0.5) is None
