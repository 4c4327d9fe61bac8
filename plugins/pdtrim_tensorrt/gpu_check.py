"""The CUDA kernel of the pack, compiled by nvcc here, against torch's bytes on the CPU; torch and nvcc are enough."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from shutil import which

import torch

from pdtrim_deploy.gpucheck.checks import Check, Figure
from pdtrim_deploy.gpucheck.wireplan import Rule, Shape, WirePlan
from pdtrim_deploy.kvcache import torch_pack
from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.plan.wire import WireDtype
from pdtrim_tensorrt.compile_kernels import compile_for_gpus
from pdtrim_tensorrt.kernel import SendKernel

DTYPES = ("float32", "float16", "bfloat16")
WIRES: tuple[WireDtype, ...] = ("native", "int8", "fp8")
SHAPE = (300, 8, 128)  # slots, KV heads, head size


def cuda_pack_checks(device: torch.device | None = None, compiled: Callable[[Path], Path] | None = None) -> list[Check]:
    """Each pool dtype in each wire dtype; `compiled` makes the library in a folder, nvcc otherwise."""
    skip = ""
    if compiled is None and not which("nvcc"):
        skip = "nvcc is not on PATH: install NVIDIA's CUDA toolkit, 13.0 or later"

    @cache
    def kernel() -> SendKernel:
        with tempfile.TemporaryDirectory() as folder:  # what is loaded stays
            return SendKernel(compiled(Path(folder)) if compiled else compile_for_gpus(Path(folder))[0])

    return [
        Check(f"CUDA pack: {wire} from {dtype}", partial(same_bytes, kernel, device, wire, dtype), 10, skip)
        for wire in WIRES
        for dtype in DTYPES
    ]


def same_bytes(kernel: Callable[[], SendKernel], device: torch.device | None, wire: WireDtype, dtype: str) -> Figure:
    """Rows of one layer in random order, heads of zeros and of large numbers among them.

    Raises:
        AssertionError: a byte differs.

    """
    slots, heads, head_dim = SHAPE
    plan, generator = WirePlan(Shape(heads, head_dim, dtype), (Rule(wire),)), torch.Generator().manual_seed(3)
    keys, values = (torch.randn(SHAPE, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    keys[3, 0], values[5, heads - 1, 0] = 0, 2.0**15
    rows = torch.randperm(slots, generator=generator)[: slots - 9]
    expected = torch_pack.pack(chunk_layout(plan, len(rows)), [keys], [values], rows)
    there = device or torch.device("cuda", torch.cuda.current_device())
    packed = torch.full_like(expected, 0xA5, device=there)
    kernel()(keys.to(there), values.to(there), rows.to(there), packed, wire_dtype=wire)
    bad = int((packed.cpu() != expected).sum())  # waits for the default stream, on which the kernel ran
    assert not bad, f"{bad} of {len(expected)} bytes differ from torch's on the CPU"
    return {"bytes_compared": len(expected), "bytes_different": 0}
