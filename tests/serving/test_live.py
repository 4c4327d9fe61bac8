"""The serve environment's packages besides SGLang."""

import subprocess

import pytest

from pdtrim_deploy.serving import ClusterSpec, ServeEnvironment, WorkerOptions, commands

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]


def test_the_serve_environment_has_our_plugin_and_a_stub_that_says_so():
    program = """
from importlib.metadata import entry_points
assert [e.value for e in entry_points(group="sglang.srt.plugins") if e.name == "pdtrim"] == ["pdtrim_sglang:register"]
import sgl_kernel
if sgl_kernel.__version__.endswith("stub"):
    try:
        sgl_kernel.silu_and_mul(1)
    except RuntimeError as error:
        assert "CPU stub" in str(error) and "silu_and_mul" in str(error), error
    else:
        raise SystemExit("the stub computed something")
"""
    subprocess.run([ServeEnvironment.find().python, "-c", program], check=True, timeout=120)


def test_imports_of_a_worker_of_two_openmp_threads_start_no_thread(tmp_path):
    """A worker's launcher forks its processes while it has one thread (`pdtrim_sglang/patches/processes.py`)."""
    worker = ClusterSpec.on_loopback(tmp_path, tmp_path, options=WorkerOptions(device="cpu", threads=2)).workers[0]
    python = ServeEnvironment.find().python
    program = 'import os, numpy, torch; print(torch.get_num_threads(), len(os.listdir("/proc/self/task")))'
    environment = commands.worker_environment(python, worker, 2, tmp_path)
    run = subprocess.run([python, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["2", "1"]
