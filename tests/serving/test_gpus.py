"""A worker gets only GPUs that it will see."""

from pathlib import Path

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.serving import ClusterSpec, WorkerOptions, commands
from pdtrim_deploy.serving.environment import gpu_count

MIG = "  MIG 1g.5gb Device 0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)"


@pytest.fixture
def eight(tmp_path, monkeypatch):
    """A host with eight GPUs, the last one split."""
    lines = [f"GPU {n}: NVIDIA H100 80GB HBM3 (UUID: GPU-{n}be1-4a5c)" for n in range(8)] + [MIG]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\ncat <<E\n" + "\n".join(lines) + "\nE\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        ("3", 1), ("0, 5,7", 3), ("", 0), ("-1", 0), ("2,-1,3", 1), ("1,,2", 1), ("6,8,1", 1), ("x", 0),
        ("GPU-3be1-4a5c,GPU-0be1", 2), ("GPU-9be1,0", 0), ("MIG-c6d4f1ef", 1),
    ],
)  # fmt: skip
def test_what_cuda_visible_devices_leaves(eight, monkeypatch, visible, count):
    assert gpu_count() == 8
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_count() == count
    assert WorkerOptions().device == ("cuda" if count else "cpu")


def test_a_worker_is_told_of_a_gpu_that_it_sees(eight, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    workers = ClusterSpec.on_loopback(Path("m"), Path("m"), options=WorkerOptions(device="cuda")).workers
    command_lines = [commands.worker_command(Path("python"), worker) for worker in workers]
    assert [words[words.index("--base-gpu-id") + 1] for words in command_lines] == ["0", "1"]


def test_workers_on_gpus_have_the_time_that_sglang_takes_to_end():
    """5 s until it looks for SIGTERM, 15 s for schedulers."""
    spec = ClusterSpec.on_loopback(Path("m"), Path("m"), options=WorkerOptions(device="cuda"), gpus=2)
    assert spec.stop_timeout_s > 5 + 15


def test_what_is_not_visible_does_not_count(eight, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match="2 workers of 1, 1 ranks need 2 GPUs and there is 1 here"):
        ClusterSpec.on_loopback(Path("m"), Path("m"), options=WorkerOptions(device="cuda"))
