"""The checksum of bytes on a GPU: its meaning in plain Python, what it notices, its kernel in Triton's interpreter."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pdtrim_deploy.kvcache.checksum import checksum, torch_checksum

MASK = (1 << 64) - 1


def plainly(data):
    """As the module's text says, in Python's integers."""
    data, total = data + bytes(-len(data) % 8), 0
    for place in range(0, len(data), 8):
        word = int.from_bytes(data[place : place + 8], "little")
        word = (word + (place // 8 + 1) * 0x9E3779B97F4A7C15) & MASK
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
        total += word ^ (word >> 31)
    return total & MASK


def of(data):
    return int(checksum(torch.frombuffer(bytearray(data), dtype=torch.uint8))) & MASK


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 1001])
@pytest.mark.parametrize("fill", ["random", "zeros", "ones"])
def test_its_meaning(size, fill):
    data = {"random": random.Random(size).randbytes(size), "zeros": bytes(size), "ones": b"\xff" * size}[fill]
    assert of(data) == plainly(data)


def test_no_bytes_have_a_checksum():
    assert int(torch_checksum(torch.empty(0, dtype=torch.uint8))) == 0


def test_it_notices_a_bit_a_swap_a_shift_and_an_older_chunk():
    dice = random.Random(0)
    data = dice.randbytes(4096)
    changed = {data}
    for _ in range(200):
        bit = dice.randrange(8 * len(data))
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        changed.add(bytes(damaged))
    changed |= {data[8:16] + data[:8] + data[16:], data[1:] + data[:1], data[8:] + data[:8]}
    changed |= {data[:2048] + bytes(2048), data[:2048] + dice.randbytes(2048), bytes(4096)}
    assert len({of(other) for other in changed}) == len(changed) > 200


def test_the_kernel_in_tritons_interpreter():
    pytest.importorskip("triton", reason="triton comes with CUDA builds of torch: the serve environment has it")
    script = Path(__file__).with_name("interpreted_checksum.py")
    command = [sys.executable, "-m", "pytest", "--no-header", "-q", str(script)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=250, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_chunks_of_all_sizes_have_one_kernel():
    """Which Triton would otherwise compile anew for sizes that 16 divides, while a request waits."""
    pytest.importorskip("triton", reason="triton comes with CUDA builds of torch: the serve environment has it")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from pdtrim_deploy.kvcache.gpu.checksum import BLOCK, add_words

    backend = make_backend(GPUTarget("cuda", 90, 32))
    bound = create_function_from_signature(add_words.signature, add_words.params, backend)
    data, total = torch.zeros(64, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    kinds = {str(bound(data, size, total, block=BLOCK)[1]) for size in (1, 7, 16, 1000, 1 << 20)}
    assert len(kinds) == 1


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_machine_code(capability, tmp_path, monkeypatch):
    """Words are loaded whole, nothing is spilt, one addition a program."""
    triton = pytest.importorskip(
        "triton", reason="triton comes with CUDA builds of torch: the serve environment has it"
    )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pdtrim_deploy.kvcache.gpu.checksum import BLOCK, add_words

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {"data": "*u8", "size": "i32", "total": "*i64", "block": "constexpr"}
    aligned = {(place,): [["tt.divisibility", 16]] for place in (0, 2)}
    source = ASTSource(add_words, signature, {"block": BLOCK}, attrs=aligned)
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    ptx = code.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    assert "ld.global.b64" in ptx
    assert ".local" not in ptx
    assert ptx.count("atom.") == 1
