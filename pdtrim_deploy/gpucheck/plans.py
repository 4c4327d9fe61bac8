"""Plans that change what workers compute or send: KV-only layers, sublayers, experts, key offsets; SmolLM2's own."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.gpucheck import tiny, tiny_fp8
from pdtrim_deploy.gpucheck.bundles import CUT, lazily
from pdtrim_deploy.gpucheck.checks import Check, NotHere, sentence
from pdtrim_deploy.gpucheck.pair import Pair, fidelity_check
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.targets import TargetsSection

RECIPES = Path(__file__).resolve().parents[2] / "recipes"  # of a clone
NO_PREFILL_GRAPHS = ("--cuda-graph-backend-prefill", "disabled")


def smollm2_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """SmolLM2 pruned and quantised, on a GPU in bfloat16, against the oracle; from the cache of models."""
    pair = pair or Pair(serve)

    def bundle() -> Bundle:
        os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            recipe = Recipe.load(RECIPES / "smollm2-quick.yaml")
            dtype = "bfloat16" if pair.device == "cuda" else recipe.model.dtype
            model = recipe.model.model_copy(update={"dtype": dtype})
            recipe = recipe.model_copy(update={"targets": TargetsSection(), "model": model})
            return build(recipe, folder / "bundle", Cache.default(), print)
        except (UserError, OSError) as error:
            raise NotHere(f"the model or its text is not here: {sentence(error)}") from None

    return [fidelity_check("SmolLM2", bundle, pair)]


def plan_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """Tiny pairs against the oracle; KV-only layers with prefill's CUDA graphs first, then without."""
    pair = pair or Pair(serve)
    kv_only = lazily(folder / "kv-only", CUT, healing={"kv_only_blocks": 2, "sequences": 8, "length": 64})
    tailed = {"kv_only_blocks": 2, "kv_only_tail": 16, "sequences": 8, "length": 64}
    tail = lazily(folder / "kv-only-tail", CUT, healing=tailed)
    fewer = {"prefill_attentions": 1, "decode_attentions": 2, "prefill_mlps": 1, "decode_mlps": 1}
    whole = {"method": "none", "wire_dtype": "int8"}
    sublayers = lazily(folder / "sublayers", whole, pruning={"method": "greedy"} | fewer)
    offsets = lazily(folder / "offsets", {**CUT, "wire_dtype": "int4"}, uneven_keys=True)
    experts = {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 2, "experts": {"prefill": 3, "decode": 2}}
    mixture = lazily(folder / "mixture", CUT, architecture=tiny.MIXTURE, pruning=experts)
    bfloat16 = lazily(folder / "bfloat16", CUT, architecture=tiny.MIXTURE, pruning={}, dtype="bfloat16")
    float32 = lazily(folder / "float32", CUT, pruning={}, dtype="float32")
    return [
        fidelity_check("KV-only layers: prefill's graphs", kv_only, pair),
        fidelity_check("KV-only layers: no prefill graphs", kv_only, replace(pair, prefill_args=NO_PREFILL_GRAPHS)),
        fidelity_check("KV-only tail", tail, pair),  # `serve` starts it without prefill's graphs
        fidelity_check("sublayers", sublayers, pair),
        fidelity_check("key offsets: int4", offsets, pair),
        fidelity_check("experts: fewer in each stage", mixture, pair),
        fidelity_check("bfloat16: mixture, layers cut", bfloat16, pair),  # whose RoPE would store K and V in SGLang
        fidelity_check("float32: layers cut", float32, pair),
    ]


def fp8_weight_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """Stages whose weights are FP8, against the oracle, which rounds activations as SGLang does."""
    return [
        fidelity_check(f"FP8 weights: {kind}", lazily(folder / kind, CUT, fp8=kind, pruning={}), pair or Pair(serve))
        for kind in tiny_fp8.FP8
    ]
