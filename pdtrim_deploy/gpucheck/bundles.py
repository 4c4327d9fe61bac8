"""Bundles of random models, built on the CPU when a check first needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.gpucheck import tiny
from pdtrim_deploy.gpucheck.tiny_fp8 import to_fp8
from pdtrim_deploy.gpucheck.tiny_keys import unbalance
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.recipe import Recipe

CUT: Mapping[str, Any] = {"method": "all", "n_first": 4, "n_last": 64}


def tiny_bundle(
    folder: Path,
    kv: Mapping[str, Any],
    size: tiny.Size = tiny.Size(),  # noqa: B008
    architecture: str = "LlamaForCausalLM",
    fp8: str | None = None,
    uneven_keys: bool = False,
    dtype: str = "float16",
    **more: Any,
) -> Bundle:
    """A bundle of a random model and text of its own; `fp8` is a format of tiny_fp8.FP8 that its weights are in.

    `uneven_keys`: those of tiny_keys.py.
    float16 where nothing depends on it, since its roundings are an eighth of bfloat16's: behind those, one wrong row of
    a random model is not seen.
    """
    folder.mkdir(exist_ok=True)
    model = tiny.save(folder / "model", size, architecture)
    if fp8 is not None:
        to_fp8(model, fp8)
    if uneven_keys:
        unbalance(model)
    recipe = tiny_recipe(folder, model, kv=dict(kv), **more)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})
    build(recipe, folder / "bundle", Cache(folder / "cache"), print)
    return Bundle.open(folder / "bundle")


def tiny_recipe(folder: Path, model: Path, **sections: Any) -> Recipe:
    """Of a model's folder, with text that is written into `folder`; `sections` are the recipe's own."""
    corpus = f"dir:{tiny.text(folder / 'text')}"
    recipe = {
        "name": "tiny",
        "model": {"source": f"hf:{model}", "dtype": "float16"},
        "calibration": {"corpus": corpus, "sequences": 2, "length": 64},
        "evaluation": {"corpus": corpus, "sequences": 2, "prompt_tokens": 64, "continuation_tokens": 16},
        "pruning": {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 2},
    }
    return Recipe.model_validate(recipe | sections)


def lazily(folder: Path, kv: Mapping[str, Any], size: tiny.Size = tiny.Size(), **more: Any) -> Callable[[], Bundle]:  # noqa: B008
    """`tiny_bundle`, built when it is first called for."""
    return cache(partial(tiny_bundle, folder, kv, size, **more))
