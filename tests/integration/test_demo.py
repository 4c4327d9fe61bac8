"""The demo from a shell, on a tiny model: all its steps, two pairs of genuine workers, one page."""

import json
import subprocess
import sys

import pytest
import yaml

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900), pytest.mark.usefixtures("no_shared_pairs")]


def test_the_demo_ends_with_its_table_and_its_page(tiny_llama_dir, real_cache, tmp_path):
    recipe = {
        "name": "tiny",
        "model": {"source": f"hf:{tiny_llama_dir}"},
        "calibration": {"corpus": "brown", "sequences": 2, "length": 64},
        "evaluation": {"corpus": "brown", "sequences": 2, "prompt_tokens": 64, "continuation_tokens": 16},
        "pruning": {"method": "streamline", "decode_blocks": 2},
        "kv": {"method": "all", "n_first": 4, "n_last": 24},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "pdtrim_deploy", "demo", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")]
    sizes = ["--requests", "6", "--rounds", "3", "--prompt-tokens", "120", "--output-tokens", "4", "--link", "1Mbps"]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "report" / "metrics.json").read_text())
    assert results["fidelity"]["passed"]
    transfer, memory, link = (results[section] for section in ("transfer", "memory", "link"))
    assert transfer["measured_bytes"] == transfer["planned_bytes"]
    assert transfer["dense_measured_bytes"] == transfer["dense_bytes"] == 2 * transfer["bfloat16_dense_bytes"]
    assert {name: (side["requests"], side["failed"]) for name, side in results["load"].items()} == {
        "dense": (6, 0),
        "pruned": (6, 0),
    }
    # Native rows travel as wide as the pool is: both pairs' relays are twice as fast as the link.
    assert link["speed"] == "1 Mb/s"
    assert link["relays"] == {"dense": "2 Mb/s", "pruned": "2 Mb/s"}
    (transfer_time,) = (ratio for ratio in results["ratios"] if ratio["figure"] == "KV transfer time")
    assert transfer_time["ratio"] < 0.5, "the link is slow enough that bytes decide: a sixth of them"
    rows = 24 + 4 + 4  # of each cut layer: last and first of the prompt, and the answer
    row = 2 * 2 * 16 * 4  # K and V, heads, head size, bytes
    held = {name: memory[name]["decode_request"] / row for name in memory}
    assert held == {"dense": pytest.approx(6 * 124, rel=0.05), "pruned": pytest.approx(4 * rows, rel=0.05)}
    assert memory["pruned"]["decode_weights"] < memory["dense"]["decode_weights"]
    assert memory["pruned"]["prefill_weights"] == memory["dense"]["prefill_weights"]
    page = tmp_path / "out" / "report" / "report.html"
    assert done.stdout.rstrip().endswith(f"page: {page}")
    assert "PDTrim / dense" in done.stdout
    assert "</html>" in page.read_text()
    assert "relays on loopback that stand for a link of 1 Mb/s" in page.read_text()
