"""The aiperf driver: its options, and what it reads from records that aiperf 0.13.0 wrote (record_aiperf.py)."""

import json
import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from pdtrim_deploy.errors import ServingError, UserError
from pdtrim_deploy.loadtest import LoadResult, LoadRun, Scenario, driver
from pdtrim_deploy.loadtest.aiperf.command import check, command, run, served_model, write_requests
from pdtrim_deploy.loadtest.aiperf.environment import VERSION, program
from pdtrim_deploy.loadtest.aiperf.records import read
from pdtrim_deploy.loadtest.scenario import SLO, Arrivals, Conversations
from pdtrim_deploy.loadtest.schedule import Job, jobs
from pdtrim_deploy.local.own_environment import REPO

sys.path.insert(0, str(Path(__file__).parent))
from record_aiperf import CASES, POISSON, RECORDED, TWO
from sse_server import Behaviour, serve, slower

INSTALLED = (REPO / ".venv" / "aiperf" / "pdtrim-stamp.json").is_file()


def recorded(case: str) -> LoadRun:
    return read(RECORDED / case, tuple(jobs(CASES[case][1])))


def test_latencies_lengths_and_lateness_of_an_open_loop() -> None:
    planned, run = tuple(jobs(POISSON)), recorded("poisson")
    result = LoadResult.of("aiperf", [run], SLO(ttft_ms=1000, itl_ms=1000))
    assert (result.requests, result.failed, result.good) == (5, 0, 5)
    assert result.prompt_tokens == [len(job.prompt.split()) for job in planned]
    assert [outcome.output_tokens for outcome in run.outcomes] == [job.output_tokens for job in planned]
    # The server's latencies are 100 and 30 ms; never early, late by what a busy machine costs.
    assert 100 <= result.ttft_ms.p50 < 130
    assert 30 <= result.itl_ms.p50 < 36
    assert 30 <= result.tpot_ms.p50 < 36
    for job, outcome in zip(planned, run.outcomes, strict=True):
        assert len(outcome.itl) == job.output_tokens - 1
        assert outcome.e2e == pytest.approx(outcome.ttft + sum(outcome.itl))
    # Sent when they were due, to some milliseconds, so all of it took as long as the schedule and the last answer.
    assert max(outcome.late for outcome in run.outcomes) < 0.05
    assert run.duration_s == pytest.approx(planned[-1].due_s + run.outcomes[-1].e2e, abs=0.06)
    assert result.client.send_late_ms.p95 == pytest.approx(max(o.late for o in run.outcomes) * 1e3, rel=0.6)
    assert result.client.cpu_share is None


def test_a_chunk_of_several_tokens_counts_as_equal_gaps() -> None:
    run = recorded("chunks")
    for outcome in run.outcomes:
        assert outcome.output_tokens == 6
        assert len(outcome.itl) == 5
        assert outcome.itl[:2] == (0.0, 0.0)  # came with the first
        assert outcome.itl[2] == outcome.itl[4] == pytest.approx(0.03, abs=0.01)


def without_usage(rows: list[dict], total: int | None) -> Iterator[dict]:
    """Records of a server or router without continuous_usage_stats: counts come once, in a chunk without text."""
    for row in rows:
        *chunks, end = row["responses"]
        for chunk in chunks:
            event = json.loads(chunk["packets"][0]["value"])
            usage = event.pop("usage")
            chunk["packets"][0]["value"] = json.dumps(event)
        usage = usage | ({} if total is None else {"completion_tokens": total})
        last = {"perf_ns": end["perf_ns"], "packets": [{"value": json.dumps({"choices": [], "usage": usage})}]}
        yield row | {"responses": [*chunks, last, end]}


def test_counts_that_come_once_at_the_end(tmp_path: Path) -> None:
    planned, path = tuple(jobs(POISSON)), "profile_export_raw.jsonl"
    shutil.copytree(RECORDED / "poisson", tmp_path, dirs_exist_ok=True)
    rows = [json.loads(line) for line in (RECORDED / "poisson" / path).read_text().splitlines()]
    (tmp_path / path).write_text("\n".join(json.dumps(row) for row in without_usage(rows, None)))
    assert read(tmp_path, planned) == recorded("poisson")
    rows = [json.loads(line) for line in (RECORDED / "poisson" / path).read_text().splitlines()]
    (tmp_path / path).write_text("\n".join(json.dumps(row) for row in without_usage(rows, 1)))
    assert {outcome.failure for outcome in read(tmp_path, planned).outcomes} == {
        "truncated"
    }  # what was counted decides


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("status", "http_503"),
        ("lose", "truncated"),
        ("silent", "truncated"),
        ("error_event", "error"),
        ("garbage", "error"),
        ("hang", "timeout"),
        ("refused", "refused"),
    ],
)
def test_failures_have_the_kinds_of_the_builtin_driver(case: str, kind: str) -> None:
    result = LoadResult.of("aiperf", [recorded(case)])
    assert (result.failed, result.failures) == (2, {kind: 2})
    assert result.failure_details[kind]
    assert result.ttft_ms.p50 is None


def test_a_request_without_a_record_is_a_failure_unless_the_load_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "profile_export.jsonl").write_text((RECORDED / "status/profile_export.jsonl").read_text())
    planned = (*jobs(TWO), Job(None, "never sent", 3))
    assert LoadResult.of("aiperf", [read(tmp_path, planned)]).failures == {"http_503": 2, "unsent": 1}
    assert len(read(tmp_path, planned, every=False).outcomes) == 2


def options(scenario: Scenario) -> dict[str, str]:
    words = command(Path("aiperf"), "http://u", "tiny", scenario, tuple(jobs(scenario)), Path("f"))
    return {a: b for a, b in pairwise([*words, "--"]) if a.startswith("--")}


def test_closed_loops_are_a_concurrency_and_open_ones_a_schedule(tmp_path: Path) -> None:
    closed = options(TWO.changed(duration_s=3.0, seed=7, deadline_s=9.0))
    assert (closed["--concurrency"], closed["--request-count"]) == ("2", "2")
    assert (closed["--benchmark-duration"], closed["--benchmark-grace-period"]) == ("3.0", "9.0")
    assert (closed["--random-seed"], closed["--request-timeout-seconds"]) == ("7", "9.0")
    assert "--no-fixed-schedule" in closed
    assert json.loads(closed["--extra-inputs"])["ignore_eos"] is True
    ramp = Arrivals(kind="ramp", rate=1.0, to_rate=9.0)
    for arrivals in (POISSON.arrivals, ramp, Arrivals(kind="constant", rate=2.0)):
        scenario = POISSON.changed(arrivals=arrivals, duration_s=2.0, requests=None)
        arguments, planned = options(scenario), tuple(jobs(scenario))
        assert "--fixed-schedule" in arguments
        assert "--concurrency" not in arguments
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        write_requests(tmp_path, planned)
        rows = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
        assert [row["timestamp"] / 1e3 for row in rows] == pytest.approx([job.due_s for job in planned])
        assert [(row["text_input"], row["output_length"]) for row in rows] == [
            (job.prompt, job.output_tokens) for job in planned
        ]


def test_a_closed_loop_without_a_number_of_requests_is_refused() -> None:
    scenario = Scenario(name="endless", arrivals=Arrivals(clients=2), duration_s=5.0)
    with pytest.raises(UserError, match=r"scenario endless: .* need requests beside duration_s; add it, or use"):
        check(scenario)
    check(scenario.changed(requests=100))
    check(POISSON.changed(requests=None, duration_s=5.0))


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_conversations_are_refused() -> None:
    with pytest.raises(UserError, match=r"scenario poisson: .* a turn of a conversation holds the answers before it"):
        check(POISSON.changed(conversations=Conversations(turns=2)))


def test_the_program_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UserError, match="not installed; make it with: python3 -m venv"):
        program(tmp_path / "wheel")
    script(tmp_path / "bin" / "aiperf", "echo 0.9.0")
    with pytest.raises(UserError, match=r"is aiperf 0\.9\.0, but its records can only be read from version 0\.13\.0"):
        program(tmp_path / "wheel")
    ours = script(tmp_path / ".venv" / "aiperf" / "bin" / "aiperf", f"echo {VERSION}")
    assert program(tmp_path / "wheel") == ours


def test_the_program_of_a_clone_is_made_by_its_tool(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tool = tmp_path / "tools" / "environment.py"
    tool.parent.mkdir()
    tool.write_text("import sys; print('aiperf: stands'); assert sys.argv[1:] == ['aiperf']")
    assert program(tmp_path) == tmp_path / ".venv" / "aiperf" / "bin" / "aiperf"
    assert capfd.readouterr().out == ""  # --json stays JSON
    tool.write_text("raise SystemExit('set-up failed: network down')")
    with pytest.raises(
        UserError, match=r"could not be made \(set-up failed: network down\); .*, or use --driver builtin"
    ):
        program(tmp_path)


def test_the_pin_and_the_version_agree() -> None:
    assert f"aiperf=={VERSION}" in (REPO / "constraints" / "aiperf.txt").read_text().splitlines()


def test_an_aiperf_that_breaks_says_why(tmp_path: Path) -> None:
    broken = script(tmp_path / "aiperf", "echo no such option; exit 2")
    with pytest.raises(ServingError, match="exit code 2 and no records: no such option"):
        run(broken, "http://127.0.0.1:9", TWO, tuple(jobs(TWO)), tmp_path)


def test_the_model_is_asked_for() -> None:
    with serve(Behaviour()) as url:
        assert served_model(url) == "tiny"
    assert served_model(url) == "default"


@pytest.mark.skipif(not INSTALLED, reason="needs .venv/aiperf: make setup-aiperf")
def test_both_drivers_send_the_same_requests_and_measure_the_same() -> None:
    assert any(measure_the_same(factor) for factor in slower())


def measure_the_same(factor: int) -> bool:
    """Whether the figures of both are near each other; what they send must be the same."""
    scenario, seen, results = POISSON.changed(requests=8, warmup=1), {}, {}
    for name in ("builtin", "aiperf"):
        behaviour = Behaviour(ttft=0.2 * factor, itl=0.05 * factor)
        with serve(behaviour) as url:
            results[name] = LoadResult.of(name, [driver(name)(url, scenario)])
        texts = [body.get("prompt") or body["text"] for body in behaviour.bodies]
        seen[name] = sorted(texts)
        assert results[name].failures == {}
    assert seen["builtin"] == seen["aiperf"]
    builtin, aiperf = results["builtin"], results["aiperf"]
    assert sorted(aiperf.prompt_tokens) == sorted(builtin.prompt_tokens)
    assert aiperf.output_tokens == builtin.output_tokens
    near = aiperf.duration_s == pytest.approx(builtin.duration_s, abs=0.3 * factor)
    for figure in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        near = near and getattr(aiperf, figure).p50 == pytest.approx(getattr(builtin, figure).p50, rel=0.2)
    return near
