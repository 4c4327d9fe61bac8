"""A sealed bundle without weights, for commands that only read its small files."""

from __future__ import annotations

import json
from pathlib import Path

from pdtrim_deploy.bundle import Bundle, Manifest, entries, seal
from pdtrim_deploy.plan import STAGES, Drop, Keep, KVSend, ModelShape, PDPlan
from pdtrim_deploy.recipe import Recipe


def make_bundle(path: Path, source: str = "hf:some/tiny", architecture: str = "X") -> Bundle:
    """Four blocks, the last one dropped, two layers sparse; the model is `source`."""
    sizes = {"num_blocks": 4, "num_kv_heads": 2, "head_dim": 8, "kv_dtype": "float32"}
    shape = ModelShape(architecture=architecture, fingerprint="f", **sizes)
    sparse = KVSend(mode="sparse", n_first=1, n_last=2)
    keep = (Keep(),) * 3 + (Drop(),)
    plan = PDPlan(model=shape, prefill=keep, decode=keep, kv=(KVSend(), sparse, sparse))
    for stage in STAGES:
        (path / stage).mkdir(parents=True)
        config = {"max_position_embeddings": 64, "pdtrim": plan.model_dump(mode="json")}
        (path / stage / "config.json").write_text(json.dumps(config))
    (path / "plan.json").write_text(plan.canonical_json())
    recipe = Recipe.model_validate({"name": "b", "model": {"source": source}})
    (path / "recipe.yaml").write_text(recipe.to_yaml())
    files = entries(path)
    seal(path, Manifest(recipe_digest="r", plan_digest=plan.digest, seed=0, versions={}, steps={}, files=files))
    return Bundle.open(path)
