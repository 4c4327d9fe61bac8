"""TensorRT for RTX takes all ops as plugins and builds engines with them, without a GPU. Presence, not numerics."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pdtrim_tensorrt.plugin_library import build_library
from pdtrim_tensorrt.rtx_libraries import rtx_environment

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed (pip install tensorrt-rtx)"
)
SCRIPT = Path(__file__).with_name("build_engine.py")
DTYPES = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16"}
ROOT = os.environ.get("TENSORRT_ROOT")


@pytest.fixture
def build(tmp_path):
    def run(**case):
        command = [sys.executable, str(SCRIPT), json.dumps(case)]
        environment = rtx_environment(tmp_path / "link")
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=200)
        return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}

    return run


def check(result, op, shape, dtype):
    assert result["layers"] == 1
    assert result["plugin_layers"] == ["node"]
    assert result["output"] == [shape, dtype]
    assert result["magic"] == "vtrt"
    assert result["in_plan"] == [op]


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(build, dtype):
    result = build(op="PagedAttention", dtype=dtype)
    check(result, "PagedAttention", [-1, 32], DTYPES[dtype])


def test_a_write_of_kv_is_not_optimised_away(build):
    check(build(op="KVWrite", dtype="FLOAT16"), "KVWrite", [-1, 24], "HALF")


def test_native_send(build):
    result = build(op="SparseKVSend", dtype="FLOAT16", wire="native")
    check(result, "SparseKVSend", [2, -1, 16], "HALF")
    assert result["wire_in_plan"] == ["native"]


@pytest.mark.parametrize("wire", ["int8", "fp8"])
def test_quantised_send(build, wire):
    result = build(op="SparseKVSend", dtype="FLOAT16", wire=wire)
    check(result, "SparseKVSend", [-1], "INT8")
    assert result["wire_in_plan"] == [wire]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"omit": ["head_dim"], "wire": "native"}, "SparseKVSend: attribute head_dim is missing"),
        ({"wire": "int5"}, "SparseKVSend: wire_dtype int5 is none of native, int8, fp8"),
    ],
)
def test_wrong_attributes_do_not_parse(build, case, message):
    result = build(op="SparseKVSend", dtype="FLOAT16", **case)
    assert not result["parsed"]
    assert message in result["stderr"]


@pytest.mark.skipif(not ROOT or not shutil.which("nvcc"), reason="needs TENSORRT_ROOT (TensorRT's headers) and nvcc")
def test_the_cpp_library_builds_engines_and_is_embedded(build, tmp_path):
    library = build_library(Path(ROOT), tmp_path / "library")
    send, attention, write = "SparseKVSend", "PagedAttention", "KVWrite"
    for op, wire, shape, dtype in (
        (send, "native", [2, -1, 16], "HALF"),
        (send, "int8", [-1], "INT8"),
        (attention, None, [-1, 32], "HALF"),
        (write, None, [-1, 24], "HALF"),
    ):
        result = build(op=op, dtype="FLOAT16", wire=wire, library=str(library))
        check(result, op, shape, dtype)
        assert result["embedded"]
