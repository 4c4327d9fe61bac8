"""One cluster for all faults: tiny random stages that differ, prefill in onnxruntime, a proxy on the transport."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from stand import Stand, record, tiny_stages

from pdtrim_deploy.serving.ports import free_ports


def pytest_addoption(parser):
    parser.addoption("--soak-requests", type=int, help="requests of the soak test (200)")
    parser.addoption("--faults-out", type=Path, help="where the table of faults is written, as JSON")


@pytest.fixture(scope="session")
def stages(tiny_model, tmp_path_factory, cache):
    """`stages(name)`: the folder of a tiny bundle's stages, with its plan; `one` and `other` differ in their plan."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model(folder / "model", "Qwen3ForCausalLM", max_position_embeddings=2048)
    return {name: tiny_stages(model, folder / name, cache, n_last) for name, n_last in (("one", 24), ("other", 25))}


@pytest.fixture(scope="session")
def stand(stages, tmp_path_factory, request):
    """The cluster, healthy; each test leaves it so."""
    patch = pytest.MonkeyPatch()
    # SGLang's own deadlines, five minutes otherwise: workers inherit them
    patch.setenv("SGLANG_DISAGGREGATION_WAITING_TIMEOUT", "20")
    patch.setenv("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", "20")
    rows = []
    try:
        with Stand(stages, tmp_path_factory.mktemp("logs"), free_ports(2), rows) as running:
            yield running
    finally:
        patch.undo()
        if out := request.config.getoption("--faults-out", None):
            record(out, rows)
