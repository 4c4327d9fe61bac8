"""The Triton form: its bytes in the interpreter (`interpreted.py`), its machine code for GPUs that are not here."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton comes with CUDA builds of torch: the serve environment has it")

ROOT = Path(__file__).parents[2]
ALL = ("native", "fp8", "int8", "int4", "int3")
BFLOAT16 = torch.bfloat16


@pytest.mark.timeout(900)
def test_bytes_equal_torchs_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "--no-header", "-W", "ignore::RuntimeWarning"]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [*command, str(Path(__file__).with_name("interpreted.py"))],
        env=env, capture_output=True, text=True, timeout=850, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.timeout(300)
def test_the_part_of_gpu_check_needs_torch_and_triton_alone():
    """Its rows from a process of its own, in which no other package can be imported (the interpreter needs numpy)."""
    places = [str(ROOT / "tests" / "gpucheck" / "torch_alone"), str(Path(__file__).parent)]
    code = (
        "from pathlib import Path; import sys; from pdtrim_deploy.gpucheck import base, supervise\n"
        "part = base.Part('kernels', 'few_kernels:checks', 200)\n"
        "for row in supervise.run_part(part, Path(sys.executable), 200): print(base.line(row))"
    )
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert [(row["status"], row["reason"]) for row in rows] == [("run", "")] * 4, run.stdout + run.stderr
    assert rows[-1]["figure"]["bytes_different"] == 0


def compiled(codes, dtype, dim, heads, capability, pack):
    """A kernel for rows with key offsets, and addresses as an allocator gives them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pdtrim_deploy.kvcache.gpu.codes import UNFUSED
    from pdtrim_deploy.kvcache.gpu.kernels import pack_runs, unpack_runs
    from pdtrim_deploy.kvcache.gpu.move import constants
    from pdtrim_deploy.kvcache.table import FIELDS, Table

    table = Table(torch.zeros(1, len(FIELDS), dtype=torch.int64), heads, dim, dtype, frozenset(codes), turned=1)
    known = constants(table, pack)
    pointers = {"table": "*i64", "slots": "*i64", "packed": "*u8", "turns": "*fp32", "origin": "*u8", "fault": "*i32"}
    kernel = pack_runs if pack else unpack_runs
    signature = pointers | {"runs": "i32", "group_stride": "i32"} | dict.fromkeys(known, "constexpr")
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name in pointers}
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, known, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=UNFUSED)


@pytest.mark.parametrize("pack", [True, False], ids=["pack", "unpack"])
@pytest.mark.parametrize(
    ("codes", "dtype", "dim", "heads", "capability"),
    [
        *((codes, BFLOAT16, 128, 8, sm) for sm in (80, 90, 100) for codes in (ALL, ("native",))),
        (ALL, torch.float16, 128, 8, 90),
        (ALL, torch.float32, 128, 1, 90),
        (ALL, BFLOAT16, 96, 4, 90),
        (ALL, BFLOAT16, 64, 3, 90),
        (("native", "int4", "int3"), torch.float8_e4m3fn, 128, 8, 90),
        (("native", "int4", "int3"), torch.float8_e5m2, 128, 8, 80),
    ],
)
def test_machine_code(codes, dtype, dim, heads, capability, pack, tmp_path, monkeypatch):
    """Nothing is fused, nothing spilt to local memory, and a pool is read and written 16 bytes at a time."""
    from triton.backends.nvidia.compiler import get_ptxas

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = compiled(codes, dtype, dim, heads, capability, pack).asm["ptx"]
    assert f".target sm_{capability}" in ptx
    assert "fma." not in ptx
    assert ".ftz" not in ptx  # subnormal numbers stay
    assert ("div.rn.f32" in ptx) == (pack and "int4" in codes)  # exact, as the bytes of scales need
    assert ".local" not in ptx
    assert f"{'ld' if pack else 'st'}.global.v4.b32" in ptx
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx)
    arch = re.search(r"\.target (\w+)", ptx)[1]
    command = [get_ptxas(capability).path, "-v", "--fmad=false", f"-arch={arch}", "-o", os.devnull, str(source)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in usage
    assert int(re.search(r"Used (\d+) registers", usage)[1]) <= 200  # 255 is where spills begin


def test_layers_of_a_chunk_may_lie_anywhere_in_it():
    """A part of a chunk's layers lies where others put it: a GPU must not read wider words there."""
    from packcases import pools, shape

    from pdtrim_deploy.kvcache.gpu.move import constants
    from pdtrim_deploy.kvcache.layout import chunk_layout
    from pdtrim_deploy.kvcache.table import chunk_tables
    from pdtrim_deploy.plan import KVSend, PDPlan

    plan = PDPlan.dense(shape(2, 1, 32, "bfloat16")).with_kv((KVSend(wire_dtype="int3"), KVSend(wire_dtype="native")))
    layout, pool = chunk_layout(plan, 4), pools(2, 8, plan.model, 0)
    native = replace(layout, layers=layout.layers[1:])
    assert native.layers[0].offset == 2 * (64 + 3 * 14)
    aligned = [
        constants(chunk_tables(part, pool, pool, pack=False)[0], False)["WIRE_ALIGN"] for part in (layout, native)
    ]
    assert aligned == [2, 4]


class PretendedDriver:
    """As much of Triton's driver as compiling asks for."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def test_chunks_of_a_plan_share_a_kernel(monkeypatch, tmp_path):
    """Through Triton's own binding of arguments: whatever a chunk's length, its runs, and where its slots begin."""
    from packcases import random_offsets, shape

    from pdtrim_deploy.kvcache.gpu import move as gpu
    from pdtrim_deploy.kvcache.layout import chunk_layout
    from pdtrim_deploy.plan import KVSend, PDPlan

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", PretendedDriver())
    kernels = []

    def warmup(kernel, programs, device, *arguments, **known):
        kernels.append(kernel.warmup(*arguments, grid=(programs,), **known, **gpu.UNFUSED))

    monkeypatch.setattr(gpu, "launch", warmup)
    for wire in ("native", "int8", "int4"):
        model, whole = shape(8, 8, 128, "bfloat16"), KVSend(wire_dtype=wire)
        sends = (*(whole,) * 2, *(whole.model_copy(update={"mode": "sparse", "n_first": 4, "n_last": 64}),) * 6)
        offsets = random_offsets(model, range(8))
        plan = PDPlan.dense(model).with_kv(sends).with_key_offsets(offsets.file)
        keys, values = ([torch.zeros(600, 8, 128, dtype=torch.bfloat16) for _ in range(8)] for _ in range(2))
        slots = torch.arange(600)
        for pack in (True, False):
            kernels.clear()
            for start, stop in ((0, 512), (512, 600), (1, 2), (4, 530), (0, 2), (3, 98), (0, 600)):
                layout = chunk_layout(plan, 600, start, stop)
                packed = torch.zeros(layout.total_bytes, dtype=torch.uint8)
                assert gpu.move(layout, packed, keys, values, slots[start:stop], offsets, pack=pack)
            assert len({id(kernel) for kernel in kernels}) == 1, wire
