"""The plans that bench-quality judges: what a recipe says of each beside the model and its calibration text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from __built import built as bundle_in
from __former_units import TRAINED_10, TRAINED_12

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.recipe import Recipe

MODELS = {"Qwen2.5-Coder-0.5B": "qwen2.5-coder-0.5b", "SmolLM2-135M": "smollm2"}
"""Each model's file in recipes/units/model."""
DENSE = "dense"
_BLOCKS = {
    "pruning": {"method": "greedy", "prefill_blocks": 1, "decode_blocks": 3},
    "healing": {"compensation": "least-squares"},
}


_TRAINED_ON = "calibration/mixed-code-agents.yaml"
_TAILED = {
    "KV-only prefill, tail": {"include": [_TRAINED_ON], "healing": TRAINED_10},
    "KV-only prefill, tail of 32": {"include": [_TRAINED_ON, "healing/kv-only-10-tail.yaml"]},
    "KV-only prefill, 12 blocks, tail of 64": {"include": [_TRAINED_ON], "healing": TRAINED_12},
}


def _budget(saved: float) -> dict[str, Any]:
    """`saved` times fewer bytes than a bfloat16 pool's; a recipe's reduction is of its own pool, here float32."""
    return {"kv": {"method": "budget", "reduction": 2 * saved, "prompt_tokens": 448}}


def _uniform(wire: str) -> dict[str, Any]:
    return {"kv": {"method": "none", "wire_dtype": wire}}


def _streaming(last: int, wire: str) -> dict[str, Any]:
    return {"kv": {"method": "all", "n_first": 4, "n_last": last, "wire_dtype": wire}}


PLANS: dict[str, dict[str, Any]] = {
    DENSE: {"kv": {"method": "none"}},
    "uniform int4": _uniform("int4"),
    "uniform k4v3": _uniform("k4v3"),
    "uniform int3": _uniform("int3"),
    "StreamingLLM 4 + 334, int4": _streaming(334, "int4"),
    "budget 2.5x": _budget(2.475),
    "budget 4x": _budget(4.0),
    "budget 4.95x": _budget(4.95),
    "StreamingLLM 4 + 64, k4v3": _streaming(64, "k4v3"),
    "budget 8x": _budget(8.0),
    "blocks": {"kv": {"method": "none"}} | _BLOCKS,
    "blocks, budget 4.95x": _budget(4.95) | _BLOCKS,
    **{name: {"kv": {"method": "none"}} | sections for name, sections in _TAILED.items()},
}
"""Sections of each plan's recipe. 4 + 334 rows of 448 in int4 are as many bytes as 4.95x leaves."""
ONLY = dict.fromkeys(_TAILED, "SmolLM2-135M")
"""Plans whose weights are trained, of one model alone: each takes most of an hour of one core."""


MIXED = {"include": ["calibration/mixed.yaml"]}
"""The calibration text of bench-quality's plans."""


@contextmanager
def built(model: str, sections: dict[str, Any], place: Path) -> Iterator[Bundle]:
    """The bundle of a recipe of these sections, below `place`; removed behind it, for want of room.

    `include` among them names further units, in recipes/units.
    """
    units, folder = Path(__file__).resolve().parent.parent / "recipes" / "units", place / "bundle"
    parts = [str(units / part) for part in (f"model/{MODELS[model]}.yaml", *sections.get("include", ()))]
    place.mkdir(parents=True, exist_ok=True)
    (place / "recipe.yaml").write_text(json.dumps({"name": "quality"} | sections | {"include": parts}))
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield bundle_in(Recipe.load(place / "recipe.yaml"), folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
