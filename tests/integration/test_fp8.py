"""Pairs with FP8 weights and fp8 KV pools, served by genuine SGLang workers: the oracle's tokens.

SGLang reads codes and scales, and keeps rows in fp8. What multiplies them is torch, in place of its kernels for GPUs
(`pdtrim_sglang/cpu`).
"""

import pytest
import torch
from tinyfp8 import write_fp8
from tinytext import write_words

from pdtrim_deploy.evaluation.fidelity import run_fidelity
from pdtrim_deploy.gpucheck import tiny
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.recipe import Recipe

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]


CUT = {"method": "all", "n_first": 4, "n_last": 24, "wire_dtype": "int8", "key_offsets": False}


@pytest.mark.parametrize(
    ("kind", "kv"),
    [
        ("compressed-block", CUT),
        ("fp8-tensor", {"method": "none", "wire_dtype": "int4", "pool_dtype": "fp8_e4m3"}),
        ("modelopt", CUT | {"wire_dtype": "native", "pool_dtype": "fp8_e5m2"}),
    ],
)
def test_served_tokens_are_the_oracles(kind, kv, serving, cache, tmp_path):
    source = write_fp8(tiny.save(tmp_path / "model"), tmp_path / "source", kind, torch.bfloat16)
    corpus = {"corpus": f"dir:{write_words(tmp_path / 'text', files=60)}", "sequences": 2}
    data = {
        "name": "fp8",
        "model": {"source": f"hf:{source}", "dtype": "bfloat16"},
        "calibration": corpus | {"length": 120},
        "pruning": {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 2},
        "kv": kv,
        "evaluation": corpus | {"prompt_tokens": 120, "continuation_tokens": 8},
    }
    bundle = build(Recipe.model_validate(data), tmp_path / "bundle", cache)
    pool = bundle.plan.model.pool_dtype
    with serving(bundle.prefill_dir, bundle.decode_dir, dtype="bfloat16", pool_dtype=pool) as pair:
        result = run_fidelity(bundle, pair.url, cache, new_tokens=8)
    assert result.passed, result.problems
