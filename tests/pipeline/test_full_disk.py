"""A disk that takes no more of the weights: one sentence for each place that writes them, and nothing half-written."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

from pdtrim_deploy.loadtest.text import WORDS

PROGRAM = """
import json, resource, sys
from pathlib import Path
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.recipe import Recipe

resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
for name, recipe in json.loads(Path("recipes.json").read_text()).items():
    try:
        build(Recipe.model_validate(recipe), Path(name), Cache(Path("cache")))
    except UserError as error:
        print(json.dumps([name, str(error)]))
"""


def test_weights_that_do_not_fit_are_one_sentence(tmp_path: Path, tiny_llama_dir: Path) -> None:
    (tmp_path / "text").mkdir()
    for n in range(6):
        (tmp_path / "text" / f"{n}.txt").write_text(" ".join(random.Random(n).choices(WORDS, k=200)))
    text = {"corpus": f"dir:{tmp_path / 'text'}", "sequences": 4, "length": 20}
    plain = {"name": "r", "model": {"source": f"hf:{tiny_llama_dir}"}, "calibration": text}
    pruned = plain | {"pruning": {"method": "cosine", "decode_blocks": 1}}
    distil = {"method": "anneal", "decode_blocks": 1, "steps": 20, "distil": True, "threshold": -0.9}
    recipes = {
        "stage": pruned,
        "healed": pruned | {"healing": {"compensation": "least-squares", "sequences": 4, "length": 20}},
        "training": pruned | {"healing": {"decode_steps": 1, "sweep": [1.0], "sequences": 4, "length": 20}},
        "student": plain | {"pruning": distil},
    }
    (tmp_path / "recipes.json").write_text(json.dumps(recipes))
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    messages = dict(map(json.loads, done.stdout.splitlines()))
    assert messages.keys() == recipes.keys()
    for name, file in (
        ("stage", "prefill"),
        ("healed", "stage-weights"),
        ("training", ".healing-decode.safetensors"),
        ("student", "cache/students"),
    ):
        assert file in messages[name]
        assert "(File too large (os error 27)); free some space and run the same command again" in messages[name]
        assert not (tmp_path / name / "COMPLETE").exists()
    assert not list((tmp_path / "cache").glob("stud*/*/*"))
    assert not list((tmp_path / "cache").glob("stage-weights/*/*"))
