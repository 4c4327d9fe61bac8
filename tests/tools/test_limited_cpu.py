"""A command limited to AVX2 sees no newer instructions, and torch takes no kernels with them."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "limited_cpu.py"
CPUINFO = Path("/proc/cpuinfo")
PROBE = """
import sys, torch
from pdtrim_deploy.bundle.environment import machine
from pdtrim_deploy.local.processor import BF16, cpu_features
assert not cpu_features() & (BF16 | {"avx512f"})
assert machine()["cpu"].endswith(", limited to AVX2")
assert torch.backends.cpu.get_cpu_capability() == "AVX2"
sys.exit(7)
"""


def limited(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *command], capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def able() -> None:
    if platform.machine() != "x86_64" or " avx2" not in CPUINFO.read_text() or shutil.which("g++") is None:
        pytest.skip("needs an x86 CPU with AVX2, and g++")
    if limited("true").returncode:
        pytest.skip("needs a mount namespace")


def test_libraries_and_our_code_see_an_older_cpu() -> None:
    done = limited(sys.executable, "-c", PROBE)
    assert done.returncode == 7, done.stderr
    assert "limited" not in CPUINFO.read_text()


def test_the_compiler_makes_code_for_it() -> None:
    done = limited("g++", "-march=native", "-dM", "-E", "-x", "c++", "/dev/null")
    assert "__AVX2__" in done.stdout
    assert "AVX512" not in done.stdout
