"""Bundles of tiny models with scaled RoPE: built, and served by genuine pairs past the model's first context."""

import random

import pytest
import yaml

from pdtrim_deploy.evaluation.fidelity import run_fidelity
from pdtrim_deploy.loadtest.text import WORDS
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.recipe import Recipe

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

FIRST_CONTEXT = 64  # tokens; prompts are longer
ROPES = {
    "llama3": {"rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"rope_theta": 10000.0, "factor": 4.0},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """`recipe(model)`: both kinds of pruning, on text of our own."""
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    for n in range(60):
        (folder / f"{n}.txt").write_text(" ".join(rng.choices(WORDS, k=400)))

    def write(model):
        corpus = f"dir:{folder}"
        data = {
            "name": "scaled",
            "model": {"source": f"hf:{model}"},
            "calibration": {"corpus": corpus, "sequences": 2, "length": 200},
            "pruning": {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 2},
            "kv": {"method": "all", "n_first": 4, "n_last": 64},
            "evaluation": {"corpus": corpus, "sequences": 2, "prompt_tokens": 200, "continuation_tokens": 8},
        }
        path = model.parent / "recipe.yaml"
        path.write_text(yaml.safe_dump(data))
        return Recipe.load(path)

    return write


@pytest.mark.parametrize(("kind", "architecture"), [("llama3", "LlamaForCausalLM"), ("yarn", "Qwen2ForCausalLM")])
def test_served_tokens_are_the_oracles(kind, architecture, recipe, tiny_model, serving, cache, tmp_path):
    rope = {"rope_type": kind, "original_max_position_embeddings": FIRST_CONTEXT} | ROPES[kind]
    model = tiny_model(tmp_path / "model", architecture, rope_parameters=rope)
    bundle = build(recipe(model), tmp_path / "bundle", cache)
    with serving(bundle.prefill_dir, bundle.decode_dir, dtype="float32") as pair:
        result = run_fidelity(bundle, pair.url, cache, new_tokens=8)
    assert max(row.prompt_tokens for row in result.rows) > 2 * FIRST_CONTEXT
    assert result.max_logprob_error <= result.tolerance, result.rows
    assert all(result.controls_detected.values()), result.controls
