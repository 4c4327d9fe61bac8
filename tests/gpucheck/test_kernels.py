"""The kernel part of the check on a GPU, where there is none; its bits run in tests/kvcache/interpreted.py."""

import subprocess
import sys

import pytest
import torch

from pdtrim_deploy.gpucheck import kernels
from pdtrim_deploy.gpucheck.row import Row


def test_without_a_gpu_it_is_skipped(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(kernels.kernel_rows()) == [Row("kernels", "skipped", "torch sees no CUDA device")]


def test_without_triton_it_is_skipped(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)
    (row,) = kernels.kernel_rows(torch.device("cpu"))
    assert (row.status, "Triton" in row.reason) == ("skipped", True)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError("3 of 9 bytes differ"), "3 of 9 bytes differ"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "OutOfMemoryError: CUDA out of memory."),
        (ValueError(), "ValueError:"),
    ],
)
def test_a_check_that_raises_has_failed_and_the_others_go_on(monkeypatch, error, reason):
    def broken(*_):
        raise error

    monkeypatch.setattr(kernels, "library", lambda: True)
    monkeypatch.setattr(kernels, "bits", lambda *_: {"bytes_different": 0})
    monkeypatch.setattr(kernels, "bandwidth", broken)
    monkeypatch.setattr(kernels, "launches", broken)
    rows = list(kernels.kernel_rows(torch.device("cpu")))
    assert {(row.status, row.reason) for row in rows} == {("run", ""), ("failed", reason)}
    assert len({row.part for row in rows}) == len(rows) == 6 * 3 + 6 * 2
    assert all((row.figure is None) == (row.status == "failed") for row in rows)


def test_it_needs_neither_transformers_nor_a_cli():
    others = {"transformers", "safetensors", "sglang", "yaml", "click", "rich", "numpy"}
    code = (
        "import sys, torch; before = set(sys.modules); "
        "import pdtrim_deploy.gpucheck.kernels; print(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not others & set(run.stdout.split())
    assert "pydantic" in run.stdout.split()
