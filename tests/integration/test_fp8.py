"""Pairs with FP8 weights and fp8 KV pools, served by genuine SGLang workers: the oracle's tokens.

SGLang reads codes and scales, and keeps rows in fp8. What multiplies them is torch, in place of its kernels for GPUs
(`pdtrim_sglang/cpu`).
"""

import itertools
import json
import shutil

import httpx
import pytest
import tinyfp8
import torch
from bundle_variants import variant
from safetensors.torch import load_file, save_file
from tinyfp8 import SQUARE, write_fp8
from tinyrecipe import words_recipe
from tinytext import write_words

from pdtrim_deploy.evaluation.fidelity import run_fidelity
from pdtrim_deploy.gpucheck import tiny
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.plan.wire import SMALLER_THAN_FP8

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

# FP8 inputs make much of roundings, so rows are few: a wrong number of them tells.
FEW = {"method": "all", "n_first": 2, "n_last": 6, "wire_dtype": "native", "key_offsets": False}
MORE = {"method": "all", "n_first": 4, "n_last": 24, "wire_dtype": "int4", "key_offsets": False}
E4M3, E5M2 = {"pool_dtype": "fp8_e4m3"}, {"pool_dtype": "fp8_e5m2"}


@pytest.fixture
def built(cache, tmp_path):
    """`built(kind of weights, dtype of all else, settings of KV)`: a bundle of a tiny model."""

    def make(kind, dtype, kv):
        source = tiny.save(tmp_path / "model")
        if kind:
            source = write_fp8(source, tmp_path / "source", kind, getattr(torch, dtype), SQUARE)
        text = write_words(tmp_path / "text", files=60, words=1600)
        return build(words_recipe(source, text, kv, dtype), tmp_path / "bundle", cache)

    return make


@pytest.mark.parametrize(
    ("kind", "dtype", "kv"),
    [
        ("compressed-block", "float16", FEW),
        ("compressed-channel", "float16", FEW),
        ("fp8-tensor", "float16", FEW | E4M3),
        ("", "float32", MORE | E4M3),
        ("", "float32", MORE | E5M2),
    ],
    ids=[
        "weights",
        "--quantization fp8",
        "weights and an e4m3 pool",
        "an e4m3 pool in each wire dtype",
        "an e5m2 pool in each wire dtype",
    ],
)
def test_served_tokens_are_the_oracles(built, serving, cache, monkeypatch, kind, dtype, kv):
    loaded = kind == "compressed-channel"  # SGLang quantises what it loads as such a checkpoint is: row by row
    if loaded:  # and leaves no layer out
        monkeypatch.setattr(tinyfp8, "IGNORED", "model.layers.99.mlp.down_proj")
    bundle = built(kind, dtype, kv)
    if not kind:
        wires = zip(bundle.plan.kv, itertools.cycle(SMALLER_THAN_FP8))
        rules = [send.model_copy(update={"wire_dtype": wire}) for send, wire in wires]
        bundle = variant(bundle, rules, bundle.path.with_name("each"))
    stages, options = (bundle.prefill_dir, bundle.decode_dir), {"pool_dtype": bundle.plan.model.pool_dtype}
    if loaded:
        stages = map(in_16_bits, stages)
        options["extra_args"] = ("--quantization", "fp8")
    with serving(*stages, dtype=dtype, **options) as pair:
        result = run_fidelity(bundle, pair.url, cache, new_tokens=8)
        print(result.to_json() | {"rows": ()})
        assert result.passed, result.problems
        if kind == "compressed-block":
            weights_are_updated(pair, bundle)


def in_16_bits(stage):
    """A copy of a stage with weights that its codes and scales stand for."""
    folder = stage.with_name(f"{stage.name}-16-bits")
    shutil.copytree(stage, folder)
    weights, config = load_file(stage / "model.safetensors"), json.loads((stage / "config.json").read_text())
    scales = {name.removesuffix("_scale"): weights.pop(name) for name in [*weights] if name.endswith("weight_scale")}
    assert scales
    weights |= {name: (weights[name].float() * scale.float()).half() for name, scale in scales.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights_are_updated(pair, bundle):
    """SGLang loads other codes into decode's layers in use, and the stage's own again; an empty folder is refused."""

    def answer():
        sampling = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": list(range(40, 200)), "sampling_params": sampling}
        response = httpx.post(f"{pair.url}/generate", json=body, timeout=120)
        assert response.status_code == 200, response.text
        return response.json()["output_ids"]

    def update(folder):
        url = f"{pair.workers[1].spec.url}/update_weights_from_disk"
        return httpx.post(url, json={"model_path": str(folder)}, timeout=120)

    before, other, weights = answer(), bundle.path / "other", bundle.decode_dir / "model.safetensors"
    shutil.copytree(bundle.decode_dir, other)
    rolled = {
        name: rows.roll(1, 0) if name.endswith("o_proj.weight") else rows for name, rows in load_file(weights).items()
    }
    save_file(rolled, other / weights.name, metadata={"format": "pt"})
    assert update(other).json()["success"]
    assert answer() != before
    (other / weights.name).unlink()
    assert update(other).status_code == 400
    assert update(bundle.decode_dir).json()["success"]
    assert answer() == before
