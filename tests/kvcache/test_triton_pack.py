"""The Triton kernel: its bytes in the interpreter, its PTX for the GPUs that we do not have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton comes with CUDA builds of torch: the serve environment has it")

OFFSET = {"mean": "*fp32", "table": "*fp32", "positions": "*i64"}
POOLS = {"*fp32": "float32", "*bf16": "bfloat16", "*fp16": "float16"}


def test_bytes_equal_the_torch_codecs():
    child = Path(__file__).with_name("triton_child.py")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, child], env=env, capture_output=True, text=True, timeout=240, check=False)
    assert run.stdout.strip() == "equal", run.stderr[-3000:]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("kind", "offset"), [("native", 0), ("int8", 0), ("fp8", 0), ("int8", 1), ("fp8", 1)])
def test_it_compiles_to_ptx(kind, offset, capability, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pdtrim_deploy.kvcache.triton_offset import UNFUSED
    from pdtrim_deploy.kvcache.triton_pack import BLOCK_ROWS, KINDS, send_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for pool in POOLS:
        codes = pool if kind == "native" else "*u8"
        scales = pool if kind == "native" else "*fp16"
        signature = {"pool": pool, "slots": "*i64", "codes": codes, "scales": scales, **OFFSET, "rows": "i32"}
        constants = {"HEADS": 8, "DIM": 128, "WIDTH": 128, "ROWS": BLOCK_ROWS, "KIND": KINDS[kind], "OFFSET": offset}
        source = ASTSource(send_rows, signature | dict.fromkeys(constants, "constexpr"), constants)
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=UNFUSED).asm["ptx"]
        assert f".target sm_{capability}" in ptx
        assert ".entry send_rows" in ptx
        assert ("div.rn.f32" in ptx) == (kind != "native")  # exact, as the codecs' bytes want
        assert "fma." not in ptx


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("code", "offset"), [("int4", 0), ("int3", 0), ("int4", 1), ("int3", 1)])
def test_rotated_codes_compile_to_ptx(code, offset, capability, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pdtrim_deploy.kvcache.codecs.rotated import GRIDS
    from pdtrim_deploy.kvcache.triton_rotated import constants, send_rotated_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from pdtrim_deploy.kvcache.triton_offset import UNFUSED

    made = constants(8, 128, GRIDS[code]) | {"OFFSET": offset}
    for pool in POOLS:
        signature = {"pool": pool, "slots": "*i64", "codes": "*u8", "scales": "*fp16", **OFFSET, "rows": "i32"}
        source = ASTSource(send_rotated_rows, signature | dict.fromkeys(made, "constexpr"), made)
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=UNFUSED).asm["ptx"]
        assert f".target sm_{capability}" in ptx
        assert ".entry send_rotated_rows" in ptx
        assert "div.rn.f32" in ptx
        assert "fma." not in ptx  # nothing is rounded once where the codec rounds twice
