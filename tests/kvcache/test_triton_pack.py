"""The Triton kernel: its bytes in the interpreter, its PTX for the GPUs that we do not have."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton comes with CUDA builds of torch: the serve environment has it")

POOLS = {"*fp32": "float32", "*bf16": "bfloat16", "*fp16": "float16"}


def test_bytes_equal_the_torch_codecs():
    child = Path(__file__).with_name("triton_child.py")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, child], env=env, capture_output=True, text=True, timeout=240, check=False)
    assert run.stdout.strip() == "equal", run.stderr[-3000:]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kind", ["native", "int8", "fp8"])
def test_it_compiles_to_ptx(kind, capability, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pdtrim_deploy.kvcache.triton_pack import BLOCK_ROWS, KINDS, send_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for pool in POOLS:
        codes = pool if kind == "native" else "*u8"
        scales = pool if kind == "native" else "*fp16"
        signature = dict.fromkeys(("keys", "values"), pool) | {"slots": "*i64", "k_codes": codes, "v_codes": codes}
        signature |= {"k_scales": scales, "v_scales": scales, "rows": "i32"}
        constants = {"HEADS": 8, "DIM": 128, "WIDTH": 128, "ROWS": BLOCK_ROWS, "KIND": KINDS[kind]}
        source = ASTSource(send_rows, signature | dict.fromkeys(constants, "constexpr"), constants)
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        assert f".target sm_{capability}" in ptx
        assert ".entry send_rows" in ptx
        assert ("div.rn.f32" in ptx) == (kind != "native")  # exact, as the codecs' bytes want


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_int4_compiles_to_ptx(capability, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pdtrim_deploy.kvcache.triton_int4 import constants, send_int4_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = constants(8, 128)
    for pool in POOLS:
        signature = dict.fromkeys(("keys", "values"), pool) | {"slots": "*i64"}
        for side in "kv":
            signature |= {f"{side}_codes": "*u8", f"{side}_scales": "*fp16"}
        signature |= {"rows": "i32"} | dict.fromkeys(made, "constexpr")
        source = ASTSource(send_int4_rows, signature, made)
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        assert f".target sm_{capability}" in ptx
        assert ".entry send_int4_rows" in ptx
        assert "div.rn.f32" in ptx
        # nothing is rounded once where the codec rounds twice: only the exact product with the unit, 1/8, is fused
        assert set(fused_factors(ptx)) <= {"0f3E000000"}


def fused_factors(ptx):
    """The second factor of every fused multiply-add: a constant's bits, or the name of a register."""
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+), (0f\w+);", ptx))
    pairs = dict(re.findall(r"mov\.b64\s+(%rd\d+), \{(%r\d+), \2\};", ptx))
    for operands in re.findall(r"fma\.rn\.f32(?:x2)?\s+(.*);", ptx):
        factor = operands.split(", ")[2]
        yield constants.get(pairs.get(factor, factor), factor)
