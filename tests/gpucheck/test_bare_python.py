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
TORCH_ALONE = ROOT / "tests" / "gpucheck" / "torch_alone"


@pytest.fixture(params=["3.11", "3.12"])
def python(request):
    """A Python of that version, without the packages that are installed for it."""
    homes = Path.home().glob(f".pyenv/versions/{request.param}*/bin/python")
    for candidate in (f"python{request.param}", *map(str, homes), sys.executable):
        script = "import sys; print(*sys.version_info[:2], sep='.')"
        try:
            command = [candidate, "-c", script]
            version = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        except OSError:
            continue
        if version.stdout.strip() == request.param:
            return [candidate, "-S"]
    pytest.skip(f"no Python {request.param} is on this machine")


def test_the_command_starts_without_a_package_and_skips_every_part(python, tmp_path):
    command = [*python, "-m", "pdtrim_deploy.gpucheck", "--out", str(tmp_path / "x.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "no CUDA device" in done.stderr
    assert [row["part"] for row in json.loads((tmp_path / "x.json").read_text())["rows"]] == list(PARTS)


def test_what_the_kernel_part_imports_compiles(python, tmp_path):
    places = [str(ROOT / "pdtrim_deploy" / name) for name in NEEDED]
    command = [*python, "-m", "compileall", "-q", *places]
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    subprocess.run(command, check=True, capture_output=True, timeout=200, env=environment)


def test_torch_and_triton_alone_are_enough_for_kernels_and_torch_and_nvcc_for_the_cuda_pack():
    """Where no other package can be imported, a part has all of its checks; other parts name what they lack."""
    code = """
import torch
from pathlib import Path
from pdtrim_deploy.gpucheck import check, machine, supervise
from pdtrim_deploy.gpucheck.base import add_plugins
from pdtrim_deploy.gpucheck.kernels import kernel_checks, find_spec
from pdtrim_deploy.gpucheck.registry import PARTS
add_plugins()
from pdtrim_tensorrt.gpu_check import cuda_pack_checks
import sys, pdtrim_deploy.gpucheck.kernels as kernels
kernels.find_spec = bool
assert len(kernel_checks(torch.device("cpu"))) > 40 and len(cuda_pack_checks(torch.device("cpu"), Path)) == 9
here = machine.Environment.of(Path(sys.executable))
seeing = machine.Environment(here.python, [*here.modules, "triton"], here.versions, {"name": "a GPU"})
for part in PARTS.values():
    print(part.name, check._why_not(part, seeing, None))
"""
    environment = os.environ | {"PYTHONPATH": str(TORCH_ALONE)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    reasons = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert {name for name, reason in reasons.items() if not reason} == {"kernels", "cuda-pack"}
    assert "has no transformers, pydantic, yaml" in reasons["oracle"]
