"""The demo from a shell, on a tiny model: all its steps, two pairs of genuine workers, one page."""

import json
import subprocess
import sys

import pytest
import yaml

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900), pytest.mark.usefixtures("no_shared_pairs")]


def test_the_demo_ends_with_its_table_and_its_page(tiny_llama_dir, real_cache, tmp_path):
    asked = {
        "name": "tiny",
        "model": {"source": f"hf:{tiny_llama_dir}"},
        "calibration": {"corpus": "brown", "sequences": 4, "length": 96},
        "evaluation": {"corpus": "brown", "sequences": 2, "prompt_tokens": 64, "continuation_tokens": 16},
        "pruning": {"method": "greedy", "prefill_blocks": 1, "decode_blocks": 2},
        "kv": {"method": "all", "n_first": 4, "n_last": 24},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(asked))
    command = [sys.executable, "-m", "pdtrim_deploy", "demo", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]
    sizes = ["--requests", "6", "--concurrency", "2", "--rounds", "3", "--prompt-tokens", "120", "--output-tokens", "6"]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "report" / "metrics.json").read_text())
    assert found["fidelity"]["passed"]
    assert found["transfer"]["measured_bytes"] == found["transfer"]["planned_bytes"]
    assert found["transfer"]["dense_measured_bytes"] == found["transfer"]["dense_bytes"]
    assert {name: (side["requests"], side["failed"]) for name, side in found["load"].items()} == {
        "dense": (6, 0),
        "pruned": (6, 0),
    }
    page = tmp_path / "out" / "report" / "report.html"
    assert done.stdout.rstrip().endswith(f"page: {page}")
    assert "</html>" in page.read_text()
