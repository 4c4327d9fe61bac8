"""--device: what it may name, and how blocks are spread."""

from __future__ import annotations

import pytest
from commandline import run

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local import compute
from pdtrim_deploy.local.compute import ON_CPU, Compute


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "_cuda_devices", lambda: 2)
    monkeypatch.setattr(compute, "_DRIVERS", (compute.Path("/"),))


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("cpu", ("cpu",)), ("auto", ("cuda:0",)), ("cuda", ("cuda:0",)), ("cuda:1", ("cuda:1",)),
        ("cuda:1,0", ("cuda:1", "cuda:0")),
    ],
)  # fmt: skip
def test_devices(two_gpus: None, text: str, devices: tuple[str, ...]) -> None:
    assert Compute.parse(text) == Compute(devices)
    assert Compute.parse(Compute(devices).names) == Compute(devices)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("gpu", "--device gpu: no such device; use auto, cpu"),
        ("cuda:0,0", "a GPU is named twice"),
        ("cuda:2", "torch sees GPUs 0 to 1 here, not GPU 2"),
        ("cuda:", "no such device"),
    ],
)
def test_what_is_no_device_is_one_sentence(two_gpus: None, text: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"^[^\n]*{problem}[^\n]*$"):
        Compute.parse(text)


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compute, "_cuda_devices", lambda: 0)
    assert Compute.parse("auto") == ON_CPU
    code, _, err = run(capsys, "inspect", "hf:/nowhere", "--device", "cuda")
    assert code == 2
    assert "torch sees no GPU here, not GPU 0; give --device auto or cpu" in err


def test_blocks_are_spread_in_order_as_evenly_as_can_be() -> None:
    both = Compute(("cuda:0", "cuda:1"))
    assert [both.device_of(block, 5) for block in range(5)] == ["cuda:0"] * 3 + ["cuda:1"] * 2
