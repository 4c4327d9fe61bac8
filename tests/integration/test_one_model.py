"""One model for both stages, served by genuine SGLang without disaggregation: the oracle's tokens, loads as of pairs.

A block, an attention and an MLP are gone: the plugin cuts the sublayers out, and SGLang's pool has no layer for them.
"""

import json

import pytest
import yaml
from tinytext import write_words

from pdtrim_deploy.cli import main
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.recipe import Recipe

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def whole(tiny_model, real_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    corpus = {"corpus": f"dir:{write_words(folder / 'text', files=60)}", "sequences": 2}
    lost = {f"{stage}_{unit}": 1 for stage in ("prefill", "decode") for unit in ("blocks", "attentions", "mlps")}
    data = {
        "name": "whole",
        "model": {"source": f"hf:{tiny_model(folder / 'model', vocab_size=2048, max_position_embeddings=2048)}"},
        "stages": "unified",
        "calibration": corpus | {"length": 64},
        "pruning": {"method": "greedy"} | lost,
        "healing": {"compensation": "least-squares", "sequences": 8, "length": 64},
        "evaluation": corpus | {"prompt_tokens": 64, "continuation_tokens": 8},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(data))
    return build(Recipe.load(folder / "recipe.yaml"), folder / "bundle", real_cache)


def command(*words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code or 0


def test_its_commands_work_as_on_a_pair(whole, no_shared_pairs, tmp_path, capfd):
    assert command("fidelity", whole.path, "--new-tokens", 8, "--json") == 0
    result = json.loads(capfd.readouterr().out)
    assert result["passed"]
    assert set(result["controls_detected"]) == {"first row missing", "last row missing", "an MLP more left out"}
    assert any(row["cached_tokens"] for row in result["rows"])
    assert command("loadtest", whole.path, "--requests", 4, "--prompt-tokens", 64, "--output-tokens", 8, "--json") == 0
    load = json.loads(capfd.readouterr().out)
    assert (load["requests"], load["failed"]) == (4, 0)
    assert (load["workers"]["requests"], load["workers"]["payload_bytes"]) == (0, 0)


def test_it_is_compared_with_a_pair(whole, tiny_bundle, no_shared_pairs, tmp_path, capfd):
    out = tmp_path / "compared.json"
    assert command("compare", tiny_bundle.path, whole.path, "--rounds", 3, "--out", out, "--json") == 0
    figures = [ratio["figure"] for ratio in json.loads(out.read_text())["ratios"]]
    assert {"TTFT p50", "ITL p50"} <= set(figures)
    assert "KV bytes a request" not in figures
