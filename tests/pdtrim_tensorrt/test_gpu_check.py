"""The part of the CUDA kernel: its source, compiled for the host, passes; a byte that differs is seen."""

import shutil

import pytest
import torch
from pdtrim_tensorrt import gpu_check as cuda_pack
from pdtrim_tensorrt.compile_kernels import compile_for_host

from pdtrim_deploy.gpucheck.checks import rows_of

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not on PATH")


@needs_compiler
def test_the_source_passes_and_a_byte_is_seen(monkeypatch):
    checks = cuda_pack.cuda_pack_checks(CPU, compile_for_host)
    rows = list(rows_of(checks))
    assert [(row.status, row.reason) for row in rows] == [("run", "")] * 9
    assert rows[0].figure["bytes_compared"] == 291 * 2 * 8 * 128 * 4
    pack = cuda_pack.torch_pack.pack

    def spoilt(*arguments):
        result = pack(*arguments)
        result[-1] ^= 1
        return result

    monkeypatch.setattr(cuda_pack.torch_pack, "pack", spoilt)
    (row,) = rows_of(checks[:1])
    assert (row.status, row.reason.partition(" of ")[0]) == ("failed", "1")


def test_without_nvcc_each_is_skipped(monkeypatch):
    monkeypatch.setattr(cuda_pack, "which", lambda _: None)
    rows = list(rows_of(cuda_pack.cuda_pack_checks()))
    assert {(row.status, row.reason.partition(":")[0]) for row in rows} == {("skipped", "nvcc is not on PATH")}
