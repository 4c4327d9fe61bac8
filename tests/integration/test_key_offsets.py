"""A tiny Qwen2 whose keys hold a large constant, and are scaled, built from a recipe and served by SGLang in int4.

Its RoPE is scaled by YaRN, behind a first context that most prompts pass: SGLang, the oracle and the offsets, which are
turned by the same angles, must agree on it. (Llama 3.1's RoPE: the bundle of test_served_pair.py.)
"""

import random
import re
import shutil
import time

import httpx
import pytest
import torch

from pdtrim_deploy.evaluation.fidelity import run_fidelity
from pdtrim_deploy.loadtest.text import WORDS
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.plan.kv import KEY_OFFSETS
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.serving import ClusterSpec, ServeEnvironment, WorkerOptions, commands
from pdtrim_deploy.serving.process import ServerProcess

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
PAGE_1, PAGE_16 = {}, {"page_size": 16, "chunked_prefill_size": 64}

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def bundle(tiny_model, tmp_path_factory):
    """Some layers cut, some whole; prefill and decode keep other blocks."""
    folder, rng = tmp_path_factory.mktemp("offsets"), random.Random(0)
    source = tiny_model(folder / "model", "Qwen2ForCausalLM", max_position_embeddings=2048, rope_parameters=YARN)
    model = load_model(source)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=8, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(source)
    (folder / "text").mkdir()
    for number in range(40):
        (folder / "text" / f"{number}.txt").write_text(" ".join(rng.choices(WORDS, k=1000)))
    text = {"corpus": f"dir:{folder / 'text'}"}
    kv = {
        "method": "random", "sparse_layers": 2, "n_first": 4, "n_last": 64, "wire_dtype": "int4", "sequences": 4,
        "prompt_tokens": 128, "continuation_tokens": 8,
    }  # fmt: skip
    recipe = Recipe.model_validate(
        {
            "name": "offsets",
            "model": {"source": f"hf:{source}", "dtype": "float32"},
            "calibration": text | {"sequences": 2, "length": 64},
            "pruning": {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 2},
            "kv": kv,
            "evaluation": text | {"sequences": 2, "prompt_tokens": 64, "continuation_tokens": 8},
        }
    )
    built = build(recipe, folder / "bundle", Cache(folder / "cache"))
    assert built.plan.key_offsets.layers == (0, 1, 2, 3)
    assert built.plan.key_offsets.scaled
    return built


@pytest.mark.parametrize("options", [PAGE_1, PAGE_16], ids=["page 1", "page 16, chunks of 64"])
def test_served_tokens_are_the_oracles_and_wrong_offsets_are_told_apart(bundle, serving, transfers, tmp_path, options):
    with serving(bundle.prefill_dir, bundle.decode_dir, dtype="float32", **options) as cluster:
        before = transfers(cluster)
        body = {"input_ids": list(range(5, 205)), "sampling_params": {"max_new_tokens": 2, "temperature": 0}}
        assert httpx.post(f"{cluster.url}/generate", json=body, timeout=120).status_code == 200
        assert transfers(cluster, 1, before)["payload"] - before["payload"] == bundle.plan.payload_bytes(200)
        result = run_fidelity(bundle, cluster.url, Cache(tmp_path), new_tokens=8)
    assert result.passed, result.problems
    assert max(row.prompt_tokens for row in result.rows) > 2 * YARN["original_max_position_embeddings"]
    assert any(row.cached_tokens > 200 for row in result.rows), "no prefix-cache hit was tried"
    assert {"no key offsets", "key scales left in"} <= result.controls_detected.keys()


@pytest.mark.parametrize("stage", STAGES)
def test_a_worker_whose_offsets_are_not_the_plans_says_so_and_dies(bundle, tmp_path, stage):
    """By itself: it dies before it would look for the other one."""
    folders = {name: bundle.stage_dir(name) for name in STAGES}
    folders[stage] = shutil.copytree(folders[stage], tmp_path / stage)
    file = folders[stage] / KEY_OFFSETS
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    options, python = WorkerOptions(dtype="float32"), ServeEnvironment.find().python
    (worker,) = getattr(ClusterSpec.on_loopback(*folders.values(), options=options), stage)
    command = commands.worker_command(python, worker, commands.write_secret(tmp_path))
    process = ServerProcess(
        worker.name, command, commands.worker_environment(python, worker, 2, tmp_path), tmp_path / "log"
    )
    try:
        deadline = time.monotonic() + 420
        while process.exit_code() is None and time.monotonic() < deadline:
            time.sleep(0.5)
        message = f"{KEY_OFFSETS}: has SHA-256 .*, the plan's is {bundle.plan.key_offsets.sha256}"
        assert re.search(message, process.obituary()), process.obituary()
    finally:
        process.finish(0.0)
