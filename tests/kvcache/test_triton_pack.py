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
        signature = {"pool": pool, "slots": "*i64", "codes": codes, "scales": scales, "rows": "i32"}
        constants = {"HEADS": 8, "DIM": 128, "WIDTH": 128, "ROWS": BLOCK_ROWS, "KIND": KINDS[kind]}
        source = ASTSource(send_rows, signature | dict.fromkeys(constants, "constexpr"), constants)
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        assert f".target sm_{capability}" in ptx
        assert ".entry send_rows" in ptx
        assert ("div.rn.f32" in ptx) == (kind != "native")  # exact, as the codecs' bytes want


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("code", ["int4", "int3"])
def test_rotated_codes_compile_to_ptx(code, capability, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pdtrim_deploy.kvcache.codecs.rotated import GRIDS
    from pdtrim_deploy.kvcache.triton_rotated import constants, send_rotated_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = constants(8, 128, GRIDS[code])
    for pool in POOLS:
        signature = {"pool": pool, "slots": "*i64", "codes": "*u8", "scales": "*fp16", "rows": "i32"}
        source = ASTSource(send_rotated_rows, signature | dict.fromkeys(made, "constexpr"), made)
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        assert f".target sm_{capability}" in ptx
        assert ".entry send_rotated_rows" in ptx
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
