"""The command where hardly anything is installed, under Python 3.12 where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdtrim_deploy.gpucheck.registry import PARTS

ROOT = Path(__file__).parents[2]
NEEDED = ("gpucheck", "kvcache", "plan", "errors.py")  # by the kernel part


@pytest.fixture(params=["3.11", "3.12"])
def python(request):
    """A Python of that version, without the packages that are installed for it."""
    homes = Path.home().glob(f".pyenv/versions/{request.param}*/bin/python")
    for candidate in (f"python{request.param}", *map(str, homes), sys.executable):
        script = "import sys; print(*sys.version_info[:2], sep='.')"
        try:
            version = subprocess.run([candidate, "-c", script], capture_output=True, text=True, timeout=30, check=False)
        except OSError:
            continue
        if version.stdout.strip() == request.param:
            return [candidate, "-S"]
    pytest.skip(f"no Python {request.param} is on this machine")


def test_the_command_starts_without_a_package_and_skips_every_part(python, tmp_path):
    command = [*python, "-m", "pdtrim_deploy.gpucheck", "--out", str(tmp_path / "x.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "no CUDA device" in done.stderr
    assert [row["part"] for row in json.loads((tmp_path / "x.json").read_text())["rows"]] == list(PARTS)


def test_what_the_kernel_part_imports_compiles(python, tmp_path):
    places = [str(ROOT / "pdtrim_deploy" / name) for name in NEEDED]
    command = [*python, "-m", "compileall", "-q", *places]
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    subprocess.run(command, check=True, capture_output=True, timeout=60, env=environment)
