"""Digests of what builds make, to compare two commits on one machine: proof that a change of structure changed nothing.

    .venv/build/bin/python tools/digests.py before.json            # in the old tree; minutes
    .venv/build/bin/python tools/digests.py after.json             # in the new one
    diff before.json after.json

Builds a tiny random model of each family that takes all that three recipes ask, with these, and the recipes of
`--recipe`; of each bundle the plan's digest, the SHA-256 of both stages' weights and the bytes that a prompt of 320
tokens sends.
"""

import argparse
import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

PRUNING: dict[str, Any] = {"method": "greedy", "prefill_blocks": 1, "decode_blocks": 2}
BUDGET: dict[str, Any] = {"method": "budget", "sequences": 4, "prompt_tokens": 96, "continuation_tokens": 8}
SECTIONS: dict[str, dict[str, Any]] = {
    "greedy-budget": {"pruning": PRUNING, "kv": BUDGET | {"reduction": 3.0, "sparse_choices": [[4, 16], [4, 32]]}},
    "anneal-healed": {
        "pruning": PRUNING | {"method": "anneal", "steps": 40, "distil": True, "finalists": 2},
        "students": {"steps": 4},
        "healing": {"compensation": "least-squares", "sequences": 8, "length": 48, "decode_steps": 2},
        "kv": {"method": "none", "wire_dtype": "int8"},
    },
    "kv-only-harm": {
        "pruning": PRUNING | {"prefill_blocks": 0},
        "healing": {"kv_only_blocks": 1, "sequences": 8, "length": 48},
        "kv": BUDGET | {"method": "measured-harm", "sparse_layers": 2, "n_first": 2, "n_last": 8, "wire_dtype": "int4"},
    },
}


def digests(bundle: Any) -> dict[str, Any]:
    """What a change of structure must leave alone."""
    weights = {
        f"{stage}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for stage in ("prefill", "decode")
        for path in sorted((bundle.path / stage).glob("*.safetensors"))
    }
    return {"plan": bundle.plan.digest, "payload_320": bundle.plan.payload_bytes(320)} | weights


def main() -> None:
    """Build all, write the digests."""
    from conftest import make_tiny  # type: ignore[import-not-found]
    from tinyfamilies import taking  # type: ignore[import-not-found]

    from pdtrim_deploy.loadtest.text import WORDS
    from pdtrim_deploy.local.cache import Cache
    from pdtrim_deploy.pipeline import build
    from pdtrim_deploy.recipe import Recipe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", type=Path, action="append", default=[])
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, draw = Path(name), random.Random(0)
        (folder / "text").mkdir()
        for number in range(24):
            (folder / "text" / f"{number}.txt").write_text(" ".join(draw.choices(WORDS, k=400)))
        recipes = {str(path): path for path in options.recipe}
        for architecture in taking("norm", "least-squares", "distil", "training", "kv_only_blocks"):
            model = make_tiny(folder / architecture, architecture)
            for title, sections in SECTIONS.items():
                text = {"corpus": f"dir:{folder / 'text'}"}
                recipe = {
                    "name": f"{architecture.lower()}-{title}",
                    "model": {"source": f"hf:{model}"},
                    "calibration": text | {"sequences": 4, "length": 64},
                    "evaluation": text | {"sequences": 2, "prompt_tokens": 40, "continuation_tokens": 8},
                }
                path = folder / f"{recipe['name']}.yaml"
                path.write_text(yaml.safe_dump(recipe | sections))
                recipes[str(recipe["name"])] = path
        for title, path in recipes.items():
            print(title, flush=True)
            bundle = build(Recipe.load(path), folder / "bundles" / path.stem, Cache(folder / "cache"))
            results[title] = digests(bundle)
    options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
