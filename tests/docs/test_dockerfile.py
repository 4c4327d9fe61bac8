"""The Dockerfile, as far as it can be tested without a Docker engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
SCRIPT = ROOT / "tools" / "container.sh"
HADOLINT = Path(sys.executable).parent / "hadolint"
FINAL = ("serve", "cpu")


def stages() -> dict[str, str]:
    """Instructions of each stage by its name."""
    joined = TEXT.replace("\\\n", " ")
    parts = re.split(r"^FROM (\S+) AS (\S+)$", joined, flags=re.MULTILINE)[1:]
    return dict(zip(parts[1::3], parts[2::3], strict=True))


@pytest.mark.skipif(not HADOLINT.exists(), reason="needs the docs environment")
def test_hadolint_finds_nothing_and_would_find_something(tmp_path: Path) -> None:
    done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text(TEXT.replace(":v0.5.23", ":latest").replace("FROM ${SGLANG_IMAGE}", "FROM x"))
    assert subprocess.run([HADOLINT, tmp_path / "Dockerfile"], capture_output=True, check=False).returncode == 1


def test_final_targets_run_as_a_user_and_say_whether_they_are_well() -> None:
    for name in FINAL:
        assert re.findall(r"^USER (\S+)$", stages()[name], re.MULTILINE)[-1] == "10001:10001"
        assert "HEALTHCHECK" in stages()[name]


def test_what_is_copied_exists() -> None:
    for line in re.findall(r"^COPY (?!--from)(.*)$", TEXT, re.MULTILINE):
        *sources, _ = (word for word in line.split() if not word.startswith("--"))
        for source in sources:
            assert (ROOT / source).exists(), source


def copied(stage: str, folder: Path) -> Path:
    """A folder with only the files that the stage's COPY lines take from this repository."""
    for line in re.findall(r"^COPY (?!--from)(.*)$", stages()[stage], re.MULTILINE):
        *sources, at = (word for word in line.split() if not word.startswith("--"))
        for source in sources:
            place = folder / at if at != "./" else folder / source
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, place)
    return folder


def test_the_wheel_is_made_of_what_is_copied(tmp_path: Path) -> None:
    source = copied("wheel", tmp_path / "src")
    command = [source / "tools" / "container.sh", "wheel", tmp_path / "dist"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    assert {"pdtrim_sglang/hook_targets.py", "pdtrim_deploy/models/facts/llama-3.1-8b.json"} <= set(held)


def test_it_says_how_images_are_pinned() -> None:
    assert "docker buildx imagetools inspect lmsysorg/sglang:v" in TEXT
    for image in re.findall(r"^ARG (\w+_IMAGE)=", TEXT, re.MULTILINE):
        assert f"${{{image}}}" in TEXT


def test_every_step_is_one_of_the_script() -> None:
    known = set(re.findall(r"^([a-z]+)\)$", SCRIPT.read_text(), re.MULTILINE))
    runs = [line for body in stages().values() for line in body.splitlines() if not line.startswith("COPY")]
    used = re.findall(r"container\.sh ([a-z]+)", "\n".join(runs))
    assert set(used) == known
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    done = subprocess.run([SCRIPT, "nothing"], capture_output=True, text=True, check=False)
    assert (done.returncode, "use wheel, plugin, serve" in done.stderr) == (2, True)


def test_pins_are_those_of_the_project() -> None:
    pins = dict(re.findall(r'"(sglang|sglang-router)==([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert f"lmsysorg/sglang:v{pins['sglang']}" in TEXT
    assert f"sglang-router=={pins['sglang-router']}" in SCRIPT.read_text()
    lock = (ROOT / "constraints" / "serve.txt").read_text()
    for name, version in re.findall(r'"(onnxruntime[a-z-]*)==([\d.]+)"', SCRIPT.read_text()):
        assert f"{name}=={version}\n" in lock


def test_there_is_no_secret_in_it() -> None:
    assert not re.search(r"(?i)(token|password|secret|api_key)\s*=", TEXT)
