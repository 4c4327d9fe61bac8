"""Worker counts: the bound on waits, the counts against simulation, rates from files, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from commandline import run
from hypothesis import given
from hypothesis import strategies as st

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.loadtest import LoadResult, LoadRun, Outcome, WorkerFigures
from pdtrim_deploy.loadtest.scenario import Lengths
from pdtrim_deploy.loadtest.workers import Histogram
from pdtrim_deploy.plan import Drop, Keep, KVOnly, KVSend, ModelShape, PDPlan
from pdtrim_deploy.simulation import Cluster, Load, simulate, sized
from pdtrim_deploy.sizing import Link, Rates
from pdtrim_deploy.sizing.workers import Goal, rates_of, size, wait_s

SHAPE = ModelShape(architecture="X", fingerprint="f", num_blocks=32, num_kv_heads=8, head_dim=128, kv_dtype="bfloat16")
DENSE = PDPlan.dense(SHAPE)
SPARSE = PDPlan(
    model=SHAPE,
    prefill=(Keep(),) * 30 + (Drop(),) * 2,
    decode=(Keep(),) * 28 + (Drop(),) * 4,
    kv=(KVSend(mode="sparse", n_first=4, n_last=64),) * 24 + (KVSend(),) * 4,
)
RATES = Rates(
    prefill_tokens_per_s=20_000.0,
    prefill_base_ms=5.0,
    decode_step_ms={1: 8.0, 64: 14.0, 128: 21.0},
    overhead_ms=15.0,
    transfer_ms=2.0,
)
GOAL = Goal(20.0, 2000, 100, 0.6, 0.02, Link(100e9))


def test_step_times_between_and_beyond_what_was_measured() -> None:
    steps = RATES.steps_s()
    assert len(steps) == 257
    assert (steps[1], steps[64], steps[128]) == pytest.approx((0.008, 0.014, 0.021))
    assert steps[96] == pytest.approx(0.0175)
    assert steps[256] == pytest.approx(0.035)


@pytest.mark.parametrize(("rate", "turns"), [(5.0, 1), (8.0, 1), (16.0, 2), (72.0, 8)])
def test_the_bound_on_waits_holds_and_is_no_wild_guess(rate: float, turns: int) -> None:
    rates = RATES.model_copy(update={"chunk_tokens": 2000, "prefill_base_ms": 0.0})  # 0.1 s a prompt
    load = Load.poisson(rate, 20_000, Lengths(tokens=2000), Lengths(tokens=1), seed=1)
    simulated = simulate(Cluster(turns, 1, rates, lambda n: 0, Link(1e30)), load)
    seen = np.quantile(simulated.begun - simulated.ready, 0.975)
    assert 0.95 * seen <= wait_s(rate, turns, 0.1) <= 2.5 * seen + 0.1  # 5%: a sample


@given(st.floats(0.1, 100), st.integers(1, 20), st.floats(0.001, 1))
def test_waits_grow_with_load_and_shrink_with_workers(rate: float, turns: int, service: float) -> None:
    assert wait_s(rate, turns, service) >= wait_s(rate / 2, turns, service)
    assert wait_s(rate, turns, service) >= wait_s(rate, turns + 1, service)
    assert (wait_s(rate, turns, service) == math.inf) == (rate * service >= turns)
    assert wait_s(rate, turns, 0.0) == 0.0


@pytest.mark.parametrize("plan", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    "goal",
    [
        GOAL,
        Goal(2.0, 2000, 100, 0.6, 0.02, Link(25e9)),
        Goal(60.0, 500, 300, 0.3, 0.015, Link(100e9)),
        Goal(30.0, 4000, 50, 1.0, 0.03, Link(400e9)),
        Goal(8.0, 8000, 200, 2.0, 0.012, Link(25e9), link_each=True),
    ],
    ids=lambda goal: f"{goal.rate:g}",
)
def test_the_workers_found_keep_the_slo_in_simulation(plan: PDPlan, goal: Goal) -> None:
    side = sized(plan, RATES, goal, requests=4000)
    assert side.sizing.problem is None
    assert side.simulated.good_share >= 0.95
    assert side.simulated.ttft_ms.p95 <= side.sizing.ttft_p95_ms
    # Half of the workers of either stage would not do, so the counts are not merely large.
    rates = rates_of(plan, RATES, 4000)
    for halved in ((side.sizing.prefill_workers // 2, 99), (99, side.sizing.decode_workers // 2)):
        if min(halved) >= 1:
            cluster = Cluster(*halved, rates, plan.payload_bytes, goal.link, goal.link_each)
            load = Load.poisson(goal.rate, 4000, Lengths(tokens=goal.isl), Lengths(tokens=goal.osl))
            few = simulate(cluster, load)
            late = few.figures().ttft_ms.p95 > goal.ttft_s * 1e3 or few.figures().tpot_ms.p95 > goal.itl_s * 1e3
            assert late, halved


def test_a_tail_costs_short_prompts_more() -> None:
    prefill = (*(Keep(),) * 16, *(KVOnly(),) * 16)
    plan = PDPlan(model=SHAPE, prefill=prefill, decode=(Keep(),) * 32, kv=(KVSend(),) * 32, kv_only_tail=512)
    speeds = [rates_of(plan, RATES, tokens).prefill_tokens_per_s for tokens in (256, 512, 1024, 1 << 20)]
    assert speeds[:2] == [RATES.prefill_tokens_per_s] * 2
    assert speeds[2] == pytest.approx(RATES.prefill_tokens_per_s / (1 - 0.45 / 2))
    assert speeds[3] == pytest.approx(RATES.prefill_tokens_per_s / 0.55, rel=1e-3)
    goals = [Goal(60.0, isl, 100, 1.0, 0.02, Link(1e12)) for isl in (512, 4000)]
    needed = [[sized(p, RATES, goal).sizing.prefill_workers for goal in goals] for p in (DENSE, plan)]
    assert needed[0][0] == needed[1][0]
    assert needed[1][1] < 0.7 * needed[0][1]


@pytest.mark.parametrize(("isl", "rate", "ttft_s"), [(8700, 66.0, 0.75), (8766, 2.05, 0.83)])
def test_prompts_whose_last_chunk_others_share_keep_the_slo(isl: int, rate: float, ttft_s: float) -> None:
    """A prompt of a chunk and a bit waits for the whole second chunk, which later prompts fill."""
    rates = Rates(prefill_tokens_per_s=20_000.0, decode_step_ms={1: 8.0, 64: 14.0}, overhead_ms=15.0, transfer_ms=2.0)
    side = sized(DENSE, rates, Goal(rate, isl, 2, ttft_s, 0.03, Link(1e15)), requests=3000)
    assert side.simulated.good_share >= 0.95
    assert side.simulated.ttft_ms.p95 <= side.sizing.ttft_p95_ms


def test_none_would_do_is_said_only_where_more_workers_do_not_help() -> None:
    # Hardly anybody waits; each worker's link is ten times as busy as the worker.
    goal = Goal(0.01, 2000, 100, 0.15, 0.02, Link(1e15))
    assert size(RATES, 1, goal).prefill_workers == 1
    goal = Goal(1.0, 2000, 100, 150.0, 0.02, Link(8e6), link_each=True)
    sizing = size(RATES, 60_000_000, goal)
    assert sizing.problem is None
    assert sizing.prefill_workers > 60 / 0.8


@pytest.mark.parametrize("pool", [30_000, 90_000])
def test_a_pool_is_held_from_admission_through_prefill(pool: int) -> None:
    rates = Rates(prefill_tokens_per_s=5000.0, decode_step_ms={1: 8.0, 64: 14.0}, pool_tokens=pool)
    goal = Goal(40.0, 4096, 32, 2.0, 0.02, Link(1e12))
    sizing = size(rates, 1000, goal)
    assert sizing.decode_batch == pool // 4128
    cluster = Cluster(sizing.prefill_workers, sizing.decode_workers, rates, lambda n: 1000, goal.link)
    load = Load.poisson(goal.rate, 4000, Lengths(tokens=goal.isl), Lengths(tokens=goal.osl))
    assert simulate(cluster, load).figures().ttft_ms.p95 <= sizing.ttft_p95_ms
    few = simulate(Cluster(sizing.prefill_workers, sizing.decode_workers // 3, rates, lambda n: 1000, goal.link), load)
    assert few.figures().ttft_ms.p95 > goal.ttft_s * 1e3


def test_pruning_needs_fewer_workers_and_a_thinner_link() -> None:
    goal = Goal(100.0, 4000, 300, 1.0, 0.015, Link(1e12))
    dense, sparse = (size(rates_of(plan, RATES, 4000), plan.payload_bytes(4000), goal) for plan in (DENSE, SPARSE))
    assert sparse.decode_workers < dense.decode_workers
    assert sparse.prefill_workers <= dense.prefill_workers
    assert sparse.link_bits_per_s_needed < dense.link_bits_per_s_needed / 3


def test_the_link_needed_is_enough_and_less_is_not() -> None:
    bytes_ = DENSE.payload_bytes(2000)
    sizing = size(RATES, bytes_, GOAL)
    for factor, enough in ((1.01, True), (0.98, False)):
        link = Link(sizing.link_bits_per_s_needed * factor)
        again = size(RATES, bytes_, Goal(20.0, 2000, 100, 0.6, 0.02, link))
        assert (again.prefill_workers == sizing.prefill_workers) == enough


@pytest.mark.parametrize(
    ("rates", "goal", "message"),
    [
        (RATES, {"itl_s": 0.005}, "a decode step of one request takes 8 ms; raise --slo-itl"),
        (RATES, {"ttft_s": 0.1}, "ms without any load and link; raise --slo-ttft"),
        (RATES, {"link": Link(1e9)}, "the 1 Gb/s link is too slow; "),
        (RATES.model_copy(update={"pool_tokens": 100}), {}, "pool_tokens 100 hold no request of 2100 tokens"),
    ],
    ids=["itl", "ttft", "link", "pool"],
)
def test_what_no_number_of_workers_can_do_is_said(rates: Rates, goal: dict, message: str) -> None:
    sizing = size(rates, DENSE.payload_bytes(2000), Goal(**{**GOAL.__dict__, **goal}))
    assert message in sizing.problem
    assert sizing.prefill_workers is None


def result(tokens: int, clients: int, ttft: float, itl: float, prefill: float, gaps: int = 50) -> LoadResult:
    """A result of a closed loop whose decode is never idle, with the workers' own figures."""
    outcome = Outcome(None, "", ttft, (itl,) * gaps, ttft + gaps * itl, tokens, gaps + 1)
    stage = Histogram(count=1, mean_ms=prefill * 1e3, p50_ms=None, p95_ms=None)
    transfer = Histogram(count=1, mean_ms=3.0, p50_ms=None, p95_ms=None)
    workers = WorkerFigures(
        requests=1, outcomes={}, payload_bytes=1, wire_bytes=1, dense_bytes=1, transfer=transfer,
        queues={"prefill_forward": stage},
    )  # fmt: skip
    return LoadResult.of("builtin", [LoadRun((outcome,) * clients, outcome.e2e)], None, workers)


MEASURED = {
    "a": result(100, 1, 0.005 + 0.1 + 0.003 + 0.02, 0.040, 0.105),
    "b": result(300, 1, 0.005 + 0.3 + 0.003 + 0.02, 0.040, 0.305),
    "c": result(100, 4, 0.2, 0.055, 0.2, gaps=500),
}


def test_rates_are_read_from_load_tests(tmp_path: Path) -> None:
    for name, measured in MEASURED.items():
        (tmp_path / f"{name}.json").write_text(measured.model_dump_json())
    rates = Rates.load([tmp_path / f"{name}.json" for name in MEASURED])
    assert rates.prefill_tokens_per_s == pytest.approx(1000)
    assert rates.prefill_base_ms == pytest.approx(5)
    assert rates.decode_step_ms == pytest.approx({1: 40.0, 4: 55.0})
    assert (rates.overhead_ms, rates.transfer_ms) == pytest.approx((20.0, 3.0))
    with pytest.raises(UserError, match="no result has concurrency 1; add one: loadtest --concurrency 1"):
        Rates.load([tmp_path / "c.json"])
    blind = MEASURED["a"].model_copy(update={"workers": None})
    with pytest.raises(UserError, match="a has no figures of the workers"):
        Rates.measured([("a", blind)])
    (tmp_path / "rates.yaml").write_text("prefill_tokens_per_s: 5\ndecode_step_ms: {1: 2}\n")
    with pytest.raises(UserError, match=r"rates.yaml is not a result of loadtest --json; give one file of rates"):
        Rates.load([tmp_path / "a.json", tmp_path / "rates.yaml"])
    assert Rates.load([tmp_path / "rates.yaml"]).steps_s()[200] == pytest.approx(0.002)


def test_results_that_failed_are_refused_and_a_busy_client_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="a: 2 of 9 requests failed, so it gives no rates; measure it again"):
        Rates.measured([("a", MEASURED["a"].model_copy(update={"requests": 9, "failed": 2}))])
    client = MEASURED["a"].client.model_copy(update={"bottleneck": "the client was a bottleneck: slow"})
    (tmp_path / "a.json").write_text(MEASURED["a"].model_copy(update={"client": client}).model_dump_json())
    arguments = ["llama-3.1-8b", "--rates", tmp_path / "a.json", "--rate", 1, "--slo-ttft", "9s", "--slo-itl", "1s"]
    _, out, _ = run(capsys, "plan", *arguments)
    assert f"doubtful: {tmp_path / 'a.json'}: the client was a bottleneck: slow" in out
    _, out, _ = run(capsys, "plan", *arguments, "--json")
    assert json.loads(out)["workers"]["rates"]["doubts"] == [
        f"{tmp_path / 'a.json'}: the client was a bottleneck: slow"
    ]


def test_results_take_limits_from_a_file_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(MEASURED["a"].model_dump_json())
    (tmp_path / "limits.yaml").write_text("pool_tokens: 400000\nchunk_tokens: 2048\n")
    rates = Rates.load([tmp_path / "a.json", tmp_path / "limits.yaml"])
    assert (rates.pool_tokens, rates.chunk_tokens, rates.max_running) == (400000, 2048, 256)
    (tmp_path / "limits.yaml").write_text("pool_tokens: 0\n")
    with pytest.raises(UserError, match=r"limits.yaml: pool_tokens is 0; allowed: "):
        Rates.load([tmp_path / "a.json", tmp_path / "limits.yaml"])


def test_the_rates_that_are_shipped_say_that_nobody_measured_them() -> None:
    shipped = sorted((Path(__file__).parents[2] / "scenarios" / "rates").glob("*.yaml"))
    assert shipped
    for file in shipped:
        assert Rates.load([file]).prefill_tokens_per_s > 0
        assert "ASSUMED" in file.read_text()


FAST = "prefill_tokens_per_s: 5\ndecode_step_ms: {1: 2}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prefill_tokens_per_s: 5\n", "decode_step_ms is None; allowed: requests in a batch"),
        ("prefill_tokens_per_s: 5\ndecode_step_ms: {one: 2}\n", "decode_step_ms is {'one': 2}; allowed: requests"),
        ("prefill_tokens_per_s: 0\ndecode_step_ms: {1: 2}\n", "prefill_tokens_per_s is 0; allowed: a number above 0"),
        ("speed: 1\ndecode_step_ms: {1: 2}\nprefill_tokens_per_s: 5\n", "speed is not a known key; allowed here: "),
        ("prefill_base_ms: -1\n" + FAST, "prefill_base_ms is -1; allowed: a number of at least 0"),
        ("overhead_ms: none\n" + FAST, "overhead_ms is 'none'; allowed: a number of at least 0"),
        ("transfer_ms: .inf\n" + FAST, "transfer_ms is inf; allowed: a finite number of at least 0"),
        (f"max_running: {10**30}\n" + FAST, f"max_running is {10**30}; allowed: an integer from 1 to 65536"),
        (f"pool_tokens: {10**400}\n" + FAST, "allowed: an integer from 1 to 1000000000"),
        (f"prefill_tokens_per_s: 5\ndecode_step_ms: {{{10**400}: 2}}\n", "allowed: requests in a batch"),
        ("- 1\n", "a rates is a mapping"),
    ],
)
def test_a_file_of_rates_that_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"r\.yaml") as error:
        Rates.load([tmp_path / "r.yaml"])
    assert message in str(error.value)


def test_the_command_counts_and_simulates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "rates.yaml"
    file.write_text("prefill_tokens_per_s: 20000\ndecode_step_ms: {1: 8, 64: 14}\n")
    arguments = ["llama-3.1-8b", "--rates", file, "--rate", 5, "--slo-ttft", "1s", "--slo-itl", "20ms", "--isl", "1000"]
    code, out, _ = run(capsys, "plan", *arguments, "--simulate", "--requests", 500)
    assert code == 0
    assert "simulated, not measured: 500 requests" in out
    code, out, _ = run(
        capsys, "plan", *arguments, "--rate", 1e300, "--simulate", "--requests", 500
    )  # no workers carry that
    assert (code, out.count("simulated, not measured")) == (0, 0)
    assert "assumed: Poisson arrivals" in out
    assert "8192 prompt tokens a batch, 256 requests a decode batch, a decode pool without limit" in out
    code, out, _ = run(capsys, "plan", *arguments, "--json")
    counted = json.loads(out)["workers"]
    (side,) = counted["sides"].values()
    assert side["sizing"]["prefill_workers"] >= 1
    assert side["simulated"] is None
    assert counted["slo"] == {"ttft_s": 1.0, "itl_s": 0.02, "share": 0.95}
    assert run(capsys, "plan", *arguments, "--isl", 40_000, "--rate", 1e308, "--link-each")[0] == 0
    code, out, err = run(capsys, "plan", *arguments, "--rate", 1e7, "--link-each", "--simulate")
    assert (code, out) == (2, "")
    assert "workers are too many to simulate; leave --simulate out" in err
    # Rates of a plan without a block less are the unpruned model's.
    code, out, _ = run(capsys, "plan", *arguments, "--json", "--rates-of", "planned")
    assert json.loads(out)["workers"] == counted


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--slo-ttft", "1s"], "are about workers; give --rates too"),
        (["--requests", 20000], "are about workers; give --rates too"),
        (["--seed", 0], "are about workers; give --rates too"),
        (["--rates-of", "dense"], "are about workers; give --rates too"),
        (["--rates", "FILE", "--seed", 0], "--requests and --seed are about a simulation; give --simulate too"),
        (["--rates", "FILE", "--requests", 9], "--requests and --seed are about a simulation; give --simulate too"),
        (["--rates", "FILE", "--rate", 5], "give --rate, --slo-ttft and --slo-itl too"),
        (["--rates", "FILE", "--rate", 5, "--slo-ttft", "1"], "no time above 0 with its unit"),
        (["--rates", "FILE", "--rate", 5, "--slo-ttft", "1s", "--slo-itl", "0ms"], "no time above 0 with its unit"),
        (["--rates", "nowhere", "--rate", 5, "--slo-ttft", "1s", "--slo-itl", "1s"], "no such rates file"),
    ],
)
def test_half_a_question_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, args: list[object], message: str
) -> None:
    (tmp_path / "r.yaml").write_text("prefill_tokens_per_s: 20000\ndecode_step_ms: {1: 8, 64: 14}\n")
    code, out, err = run(
        capsys, "plan", "llama-3.1-8b", *(tmp_path / "r.yaml" if word == "FILE" else word for word in args)
    )
    assert (code, out) == (2, "")
    assert message in err
