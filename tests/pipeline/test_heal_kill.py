"""kill -9 in the middle of training by gradients: the next build goes on from what was saved, to the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import yaml
from safetensors import safe_open

from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.recipe import Recipe

STEPS = 60
# A real build that saves where it stands after every step: by default a minute passes between two saves. It waits to be
# killed in the middle at the latest, where a busy machine lets it run on before this process.
CHILD = """
import sys, time
from pdtrim_deploy.cli import main
from pdtrim_deploy.pruning.healing import state
state._EVERY_S, state._SHARE = 0.0, 0
save = state.StateFile.save
def save_and_wait(self, position, tensors):
    save(self, position, tensors)
    if position.offset + position.step == 20:
        time.sleep(600)
state.StateFile.save = save_and_wait
main(sys.argv[1:])
"""


def saved_step(file: Path) -> int:
    """Steps of decode's training that the file holds; 0 while there is none."""
    if not file.is_file():
        return 0
    try:
        with safe_open(file, framework="pt") as tensors:
            facts = json.loads(bytes(tensors.get_tensor("position").tolist()))
    except (OSError, ValueError):  # the file was replaced between safetensors' two openings of it
        return 0
    return int(facts["position"]["step"])


def test_kill_9_in_the_middle_of_healing(tmp_path: Path, tiny_llama_dir: Path, text: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump({
            "name": "killed",
            "model": {"source": f"hf:{tiny_llama_dir}"},
            "calibration": {"corpus": f"dir:{text}", "sequences": 2, "length": 32},
            "pruning": {"method": "cosine", "decode_blocks": 1},
            "healing": {
                "decode_steps": STEPS, "learning_rate": 1e-3, "sweep": [1.0], "batch": 2, "sequences": 8, "length": 32
            },
            "evaluation": {"corpus": f"dir:{text}"},
        })
    )  # fmt: skip
    out, caches = tmp_path / "out", [tmp_path / "cache", tmp_path / "whole-cache"]
    training = out / ".build" / "healing-decode.safetensors"
    command = [sys.executable, "-c", CHILD, "build", str(file), "--out", str(out), "--cache-dir", str(caches[0])]
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while saved_step(training) < 3:
            assert child.poll() is None, "the build ended before it could be killed"
            time.sleep(0.002)
    finally:
        child.kill()
        child.wait()
    left = saved_step(training)
    assert 3 <= left < STEPS

    lines: list[str] = []
    resumed = build(Recipe.load(file), out, Cache(caches[0]), lines.append)
    first = next(line for line in lines if "step " in line)
    assert int(first.partition("step ")[2].split("/")[0]) > left, "steps that were saved are not done again"
    whole = build(Recipe.load(file), tmp_path / "whole", Cache(caches[1]))
    for stage in STAGES:
        weights = [(bundle.path / stage / "model.safetensors").read_bytes() for bundle in (resumed, whole)]
        assert weights[0] == weights[1]
    assert resumed.verify() == []
    assert not list(out.glob(".build*"))
