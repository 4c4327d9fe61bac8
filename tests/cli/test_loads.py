"""loadtest and compare as a user types them, against servers of known latency."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bare_bundle import make_bundle
from commandline import run
from sse_server import Behaviour, serve

SMALL = "name: a\narrivals: {kind: concurrency, clients: 2}\ninput: {tokens: 5}\noutput: {tokens: 3}\nrequests: 4\n"


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(SMALL + "slo: {ttft_ms: 1000}\n")
    return path


@pytest.fixture
def url() -> Iterator[str]:
    with serve(Behaviour(ttft=0.02, itl=0.01)) as address:
        yield address


def test_a_scenario_is_run(url: str, scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "loadtest", url, "--scenario", scenario, "--json")
    result = json.loads(out)
    assert (code, result["requests"], result["good"], result["slo"]["ttft_ms"]) == (0, 4, 4, 1000)
    assert set(result["prompt_tokens"]) == {5}
    assert result["client"]["cpu_share"] > 0
    code, out, _ = run(capsys, "loadtest", url, "--scenario", scenario)
    assert "within the SLO" in out


def test_a_scenario_and_what_it_says_already(url: str, scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "loadtest", url, "--scenario", scenario, "--requests", 3, "--prompt-tokens", 4)
    assert code == 2
    assert "--requests, --prompt-tokens: --scenario" in err


def test_workers_without_metrics(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "loadtest", url, "--requests", 1, "--warmup", 0, "--worker", "http://127.0.0.1:9")
    assert code == 1
    assert "http://127.0.0.1:9/metrics does not answer" in err


def test_counters_of_a_bundle_are_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "b").path
    code, out, err = run(capsys, "loadtest", bundle, "--worker", "http://127.0.0.1:9", "--dry-run")
    assert (code, out) == (2, "")
    assert f"--worker is for a running pair; the workers of {bundle} are started and read anyway; leave it out" in err


def test_compare(url: str, scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Behaviour(ttft=0.02, itl=0.03)) as slow:
        code, out, err = run(
            capsys, "compare", url, slow, "--scenario", scenario, "--rounds", 3, "--out", tmp_path / "c.json", "--json"
        )
    assert code == 0, err
    comparison = json.loads(out)
    assert comparison == json.loads((tmp_path / "c.json").read_text())
    ratios = {ratio["figure"]: ratio for ratio in comparison["ratios"]}
    assert ratios["ITL p50"]["ratio"] > 1.8
    assert len(ratios["ITL p50"]["rounds"]) == comparison["rounds"] == 3
    assert comparison["environment"]["command"].startswith("pdtrim-deploy compare http")


@pytest.mark.parametrize("targets", [["loadtest", "http://127.0.0.1:1"], ["compare", "http://[::1]:1", "http://a:1"]])
def test_a_scenario_that_the_driver_cannot_do_is_refused_before_anything_runs(
    targets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.yaml").write_text("name: endless\nduration_s: 5\n")
    arguments = [*targets, "--allow-remote", "--scenario", tmp_path / "s.yaml", "--dry-run"]
    code, out, err = run(capsys, *arguments, "--driver", "aiperf")
    assert (code, out) == (2, "")
    assert "scenario endless: driver aiperf sends a list of requests" in err
    assert run(capsys, *arguments)[0] == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--rounds", 2], "--rounds 2 gives no confidence interval; use at least 3"),
        (["--a-executor", "onnxruntime"], "an executor is for bundles"),
        (["--a-executor", "onnx"], "'onnx': give one of torch, onnxruntime, tensorrt"),
        (["--b-transport", "pdtrim_nixl"], "a transport is for bundles"),
        (["--b-transport-option", "stall_seconds"], "give KEY=VALUE, such as stall_seconds=10"),
        (["--b-transport-option", "devices=[a"], "'devices=[a': the value is no YAML; put text in quotes"),
        (["--link", "100Mbps"], "a link is for bundles"),
        (["--link", "fast"], "'fast' is not a link speed"),
        (["--link", "10Gbps"], "--link 10Gbps: the relay that limits the speed reaches 1 Gb/s at most"),
        (["--driver", "wrk"], "load driver 'wrk' is not known"),
    ],
)
def test_compare_refuses(more: list[object], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "compare", "http://127.0.0.1:1", "http://127.0.0.1:2", *more)
    assert code == 2
    assert says in err


def test_compare_refuses_the_same_twice(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "compare", "http://127.0.0.1:1", "http://127.0.0.1:1")
    assert code == 2
    assert "A and B are both http://127.0.0.1:1" in err


@pytest.mark.parametrize("again", ["b/", "./b", "../{folder}/b", "{bundle}"])
def test_compare_sees_the_same_through_other_words(
    again: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "b").path
    monkeypatch.chdir(tmp_path)
    second = again.format(folder=tmp_path.name, bundle=bundle)
    code, out, err = run(capsys, "compare", "b", second, "--serve-python", sys.executable, "--dry-run")
    assert (code, out) == (2, "")
    assert "A and B are both b; give two bundles" in err
    assert run(capsys, "compare", "http://127.0.0.1:1", "http://127.0.0.1:1/", "--dry-run")[0] == 2


def test_one_bundle_on_two_transports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "b").path
    arguments = ["compare", bundle, bundle, "--serve-python", sys.executable, "--dry-run", "--json"]
    more = ["--b-transport", "mooncake", "--b-transport-option", "stall_seconds=3"]
    code, out, err = run(capsys, *arguments, *more)
    assert code == 0, err
    sides = json.loads(out)["sides"]
    assert list(sides) == [str(bundle), f"{bundle} (mooncake, stall_seconds=3)"]
    backends = [
        {
            words[words.index("--disaggregation-transfer-backend") + 1]
            for name, words in programs.items()
            if name != "router"
        }
        for programs in (side["programs"] for side in sides.values())
    ]
    assert backends == [{"pdtrim_tcp"}, {"mooncake"}]
    assert '"stall_seconds": 3' in " ".join(sides[f"{bundle} (mooncake, stall_seconds=3)"]["programs"]["decode-0"])
    for wrong, says in (
        (["--a-transport", "pdtrim_tcp"], f"A and B are both {bundle}; give two bundles, or another executor"),
        (["--b-transport", "pdtrim_mooncake"], "--transport-option accept_unauthenticated=true"),
        ([*more, "--link", "1Mbps"], "--link works with pdtrim_tcp, not with mooncake; leave one of them out"),
    ):
        code, out, err = run(capsys, *arguments, *wrong)
        assert (code, out) == (2, "")
        assert says in err
