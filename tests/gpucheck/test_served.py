"""The parts that serve: a genuine pair on the CPU, and what is asked of which device."""

import pytest

from pdtrim_deploy.gpucheck import served
from pdtrim_deploy.serving import ServeEnvironment


@pytest.mark.parametrize(("device", "lacking"), [("9.0", set()), ("8.0", {"fa3", "trtllm_mha"}), ("10.0", {"fa3"})])
def test_a_device_is_asked_for_the_attention_that_it_has(monkeypatch, device, lacking):
    monkeypatch.setattr(served, "capability", lambda: device)
    backends = served.backends()
    assert {name.partition(",")[0] for name, words in backends.items() if words is None} == lacking
    assert next(iter(backends)) == "triton, full graphs"
    assert "torch_native, full graphs" not in backends
    for name, words in backends.items():
        if words:
            assert words[:2] == ("--attention-backend", name.partition(",")[0])
            assert ("--disable-cuda-graph" in words) == name.endswith("no graphs")


def test_a_check_that_raises_is_a_row_with_the_first_line_of_its_reason():
    def fails():
        raise RuntimeError("CUDA out of memory\nand a page of text")

    row = served._row("x", fails)
    assert (row.status, row.reason) == ("failed", "RuntimeError: CUDA out of memory")


@pytest.mark.serve
def test_the_tiny_pair_is_served_and_judged(monkeypatch):
    serve = ServeEnvironment.find().python
    monkeypatch.setattr(served, "ATTENTION", {"torch_native": ()})
    (row,) = served.attention_rows(serve, served.Pair(serve, device="cpu"))
    assert (row.part, row.status, row.reason) == ("served tiny pair: torch_native, no graphs", "run", "")
    assert row.figure["worst_error_nats"] <= row.figure["allowed_nats"]
    assert row.figure["controls_told_apart"] == row.figure["controls"] > 2
