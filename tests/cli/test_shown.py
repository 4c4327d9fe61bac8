"""Every command of README and docs that takes seconds and no GPU runs, as shown (tests/docs/commands.yaml).

Ours run in this process, through the command line's own entry point: importing torch and transformers anew for each
would take longer than all of them together. That the commands run as programs is tested elsewhere: test_cli.py,
test_terminal.py.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from shown import ROOT, to_run
from sse_server import Behaviour, serve

from pdtrim_deploy.cli import main
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.recipe import Recipe

URL = "http://127.0.0.1:8000"  # as shown
BUILDS = sorted(command for command in to_run() if " build " in command and "dry-run" not in command)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """A folder like a user's clone: its recipes, bundles in out/, the user's own recipes and text."""
    at = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "scenarios", "benchmarks", "Makefile", "tools", "pdtrim_deploy"):
        (at / name).symlink_to(ROOT / name)
    (at / "tiny").symlink_to(tiny_llama_dir)
    (at / "text").mkdir()
    for n in range(12):
        (at / "text" / f"{n}.txt").write_text(f"{n} quick brown foxes jump over the lazy dog " * 60)
    recipe = {
        "name": "mine",
        "model": {"source": f"hf:{tiny_llama_dir}"},
        "calibration": {"corpus": f"dir:{at / 'text'}", "sequences": 2, "length": 64},
        "evaluation": {"corpus": f"dir:{at / 'text'}", "sequences": 2, "prompt_tokens": 48, "continuation_tokens": 8},
        "pruning": {"method": "greedy", "prefill_blocks": 1, "decode_blocks": 2},
        "kv": {"method": "all", "n_first": 2, "n_last": 8},
    }
    (at / "mine.yaml").write_text(yaml.safe_dump(recipe))
    llama = {
        "include": ["recipes/llama-3.1-8b-balanced.yaml"],
        "name": "llama-3.1-8b",
        "model": {"source": "hf:/models/Llama-3.1-8B"},
    }
    (at / "llama.yaml").write_text(yaml.safe_dump(llama))
    build(Recipe.model_validate(recipe), at / "out" / "bundle", Cache(at / "cache"))
    for name in ("dense", "pruned"):
        shutil.copytree(at / "out" / "bundle", at / "out" / "demo" / name)
    return at


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(Behaviour(ttft=0.005, itl=0.0005)) as address:
        yield address


@pytest.mark.parametrize("command", [*BUILDS, *(line for line in to_run() if line not in BUILDS)])
def test_it_runs_as_shown(
    command: str, folder: Path, url: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    program, *words = shlex.split(command.replace(URL, url))
    if program == "pdtrim-deploy":
        if words[0] in ("eval", "fidelity", "build", "demo") or words[:2] == ["inspect", "hf:tiny"]:
            words += ["--cache-dir", "cache"]
        if "serve" in words[:1] or ("--dry-run" in words and words[0] in ("loadtest", "compare", "fidelity")):
            words += ["--serve-python", sys.executable]
        with pytest.raises(SystemExit) as ended:
            main(words)
        code = ended.value.code or 0
    else:
        code = subprocess.run([program, *words], check=False, timeout=250).returncode
    out, err = capfd.readouterr()
    assert code in to_run()[command], err
    assert "Traceback" not in err
    assert out or code == 2, "nothing was printed"
