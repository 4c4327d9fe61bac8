"""Builds for a target, stopped at many moments, go on to the same bundle, with nothing half-written on the way."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from snapshots import Snapshots

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.recipe import Recipe

PARTS = 3  # of the text, whose effects are kept one by one
# The program itself: once to the end, then once for each case, in a child that a signal stops behind a line of its
# progress, or whose files may have so many bytes. Prints how each ended. One thread, as children have no other.
CHILD = """
import json, os, resource, sys
import torch
from pdtrim_deploy.cli import main
from pdtrim_deploy.cli.progress import Progress

def stopped(self, text):
    note(self, text)
    if line and text.startswith(line):
        os.kill(os.getpid(), number)

torch.set_num_threads(1)
whole, *cases = json.loads(sys.argv[1])
try:
    main(whole)
except SystemExit as ended:
    assert not ended.code
note, Progress.note = Progress.note, stopped
for name, command, line, number, limit in cases:
    read, write = os.pipe()
    if not (child := os.fork()):
        os.dup2(write, 2)
        os.close(write)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            main(command)
        except SystemExit as ended:
            os._exit(ended.code or 0)
        finally:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        output = pipe.read()
    print(json.dumps([name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output]), flush=True)
"""


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_llama_dir: Path, text: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    corpus = {"corpus": f"dir:{text}"}
    data = {
        "name": "tiny",
        "model": {"source": f"hf:{tiny_llama_dir}"},
        "calibration": corpus | {"sequences": 4, "length": 32},
        "target": {"itl": 0.85, "ttft": 0.85, "kv": 3.0, "rounds": 1},
        "kv": {
            "method": "budget", "sparse_choices": [[2, 4]], "wire_choices": ["native", "int8"],
            "sequences": 4 * PARTS, "prompt_tokens": 24, "continuation_tokens": 8,
        },
        "evaluation": corpus | {"sequences": 2, "prompt_tokens": 40, "continuation_tokens": 8},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(data))
    return path


def digests(bundle: Bundle) -> dict[str, str]:
    """Digests of the plan, of the target's answer and of all weights."""
    files = (*bundle.path.glob("*/*.safetensors"), bundle.reports_dir / "target.json")
    by_file = {str(file.relative_to(bundle.path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return by_file | {"plan": bundle.plan.digest}


def measured(lines: list[str]) -> int:
    """Of how many parts of the text effects were measured about the unpruned model, at least."""
    return len({line.partition(":")[0] for line in lines if line.startswith("effects, batch ")})


def test_killed_at_any_moment_it_goes_on_to_the_same_bundle(recipe_file: Path, tmp_path: Path) -> None:
    """Before every 11th change that it makes to its files: each moment is a build of its own."""
    recipe, place = Recipe.load(recipe_file), tmp_path / "place"
    place.mkdir()
    with Snapshots(place, tmp_path / "killed", each=11) as killed:
        whole = digests(build(recipe, place / "out", Cache(place / "cache")))
    assert len(whole) == 4
    left = []
    for moment in killed:
        with contextlib.suppress(UserError):
            assert Bundle.open(moment / "out").verify() == [], f"{moment}: taken for whole"
        lines: list[str] = []
        assert digests(build(recipe, moment / "out", Cache(moment / "cache"), lines.append)) == whole
        left.append(measured(lines))
    assert left == sorted(left, reverse=True), "what was measured is not measured again"
    assert {0, PARTS} < {*left}, "moments lie in front of the measurement, within it and behind it"


def test_kill_9_ctrl_c_and_a_full_disk_within_the_joint_choice(recipe_file: Path, tmp_path: Path) -> None:
    unlimited = resource.RLIM_INFINITY
    stops = {
        "killed": ("effects, batch 2/3: block 4/6", signal.SIGKILL, unlimited),
        "stopped": ("effects, batch 3/3: block 2/6", signal.SIGINT, unlimited),
        "full for all": ("", 0, 1),
        "full for prompt KV": ("", 0, 50_000),
        "full for weights": ("", 0, 300_000),
    }
    full = {"full for all": "cache", "full for prompt KV": "prompts' KV", "full for weights": "model.safetensors"}

    def command(name: str) -> list[str]:
        return ["build", str(recipe_file), "--out", str(tmp_path / name), "--cache-dir", str(tmp_path / f"{name} c")]

    cases = [command("whole"), *([name, command(name), *how] for name, how in stops.items())]
    program = [sys.executable, "-c", CHILD, json.dumps(cases)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=300)
    ends = {name: (code, output) for name, code, output in map(json.loads, done.stdout.splitlines()[-len(stops) :])}
    assert ends.keys() == stops.keys(), done.stderr
    whole = digests(Bundle.open(tmp_path / "whole"))
    for name, (code, output) in ends.items():
        number = stops[name][1]
        if number == signal.SIGKILL:
            assert code == -number
        else:
            sentence = output.splitlines()[-1]
            assert sentence.startswith("pdtrim-deploy: ")
            says = "stopped by Ctrl-C; run the same command again to resume" if number else "File too large"
            assert (code, says in sentence, full.get(name, "") in sentence) == (130 if number else 2, True, True), (
                output
            )
            assert not [*(tmp_path / name).glob("**/.*new-*"), *(tmp_path / f"{name} c").glob("**/.*new-*")]
        with pytest.raises(UserError):
            Bundle.open(tmp_path / name)
        bundle = build(Recipe.load(recipe_file), tmp_path / name, Cache(tmp_path / f"{name} c"))
        assert digests(bundle) == whole, name
        assert bundle.verify() == []
        assert not list(bundle.path.glob(".build*"))
