"""The oracle's part: what it compares, and that it would see a device that computes something else."""

import pytest
import torch
from pretended_devices import PretendedDevices

from pdtrim_deploy.gpucheck import oracle
from pdtrim_deploy.gpucheck.checks import rows_of
from pdtrim_deploy.gpucheck.tiny import Size

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(oracle, "SEQUENCES", 2)
    monkeypatch.setattr(oracle, "TOKENS", 110)
    monkeypatch.setattr(oracle, "SIZE", Size(hidden_size=64, intermediate_size=96, num_attention_heads=2, head_dim=32))


def test_the_same_device_agrees_with_itself():
    rows = list(rows_of(oracle.oracle_checks(CPU)))
    assert [(row.status, row.reason) for row in rows] == [("run", "")] * len(rows)
    assert [row.part for row in rows][:2] == ["oracle: blockwise execution", "oracle: oracle, native"]
    assert rows[-1].part == "oracle: search"
    assert rows[0].figure["worst_error_nats"] < 1e-3


def test_a_pretended_gpu_agrees_with_the_cpu_to_the_bit():
    with PretendedDevices():
        rows = list(rows_of(oracle.oracle_checks(torch.device("cuda:0"))))
    assert [(row.status, row.reason) for row in rows] == [("run", "")] * len(rows)
    assert {row.figure["worst_error_nats"] for row in rows[1:-1]} == {0.0}


def test_a_device_that_computes_something_else_is_seen(monkeypatch):
    tiny_model, count = oracle.tiny_model, []

    def other(size):
        count.append(size)
        model = tiny_model(size)
        if len(count) == 2:  # the device's
            model.model.layers[7].mlp.down_proj.weight.data *= 3
            model.model.layers[0].mlp.down_proj.weight.data *= 0
        return model

    monkeypatch.setattr(oracle, "tiny_model", other)
    rows = list(rows_of(oracle.oracle_checks(CPU)))
    assert {row.status for row in rows[:-1]} == {"failed"}
    assert "worst error" in rows[0].reason


def test_not_a_number_is_no_agreement():
    with pytest.raises(AssertionError, match="worst error nan"):
        oracle._close(torch.tensor([torch.nan]), torch.tensor([0.0]), 1.0)
