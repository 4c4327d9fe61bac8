"""The serve environment's packages besides SGLang."""

import subprocess

import pytest

from pdtrim_deploy.serving import ServeEnvironment

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
