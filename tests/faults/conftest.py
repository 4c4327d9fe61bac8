"""One cluster for all faults: tiny random stages that differ, prefill in onnxruntime, a proxy on the transport."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from stand import Stand, record, tiny_stages

from pdtrim_deploy.serving import ServeEnvironment
from pdtrim_deploy.serving.ports import free_ports


def pytest_addoption(parser):
    parser.addoption("--soak-requests", type=int, help="requests of the soak test (200)")
    parser.addoption("--serve-python", type=Path, help="a Python with SGLang and the libraries of all transports")
    parser.addoption("--faults-out", type=Path, help="where the table of faults is written, as JSON")


@pytest.fixture(scope="session")
def stages(tiny_model, tmp_path_factory, cache):
    """`stages(name)`: the folder of a tiny bundle's stages, with its plan; `one` and `other` differ in their plan."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model(folder / "model", "Qwen3ForCausalLM", max_position_embeddings=2048)
    return {name: tiny_stages(model, folder / name, cache, n_last) for name, n_last in (("one", 24), ("other", 25))}


@pytest.fixture(scope="session")
def rows():
    """The table of faults."""
    return []


@pytest.fixture(autouse=True)
def written(request, rows):
    """After each test, so that a run which is ended leaves what it found."""
    yield
    if (out := request.config.getoption("--faults-out")) and rows:
        record(out, rows)


@pytest.fixture(scope="session")
def environment(request):
    """Where SGLang is."""
    return ServeEnvironment.find(request.config.getoption("--serve-python"))


@pytest.fixture(scope="session")
def start(stages, environment, tmp_path_factory, rows):
    """`start(transport)`: a cluster, healthy when `with` enters its block."""

    @contextlib.contextmanager
    def run(transport="tcp"):
        with pytest.MonkeyPatch.context() as patch:
            # SGLang's own deadlines, five minutes otherwise: workers inherit them
            patch.setenv("SGLANG_DISAGGREGATION_WAITING_TIMEOUT", "20")
            patch.setenv("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", "40")
            logs = tmp_path_factory.mktemp("logs")
            with Stand(stages, logs, free_ports(2), rows, transport, environment) as running:
                yield running

    return run


@pytest.fixture(scope="session")
def stand(start):
    """The cluster that most faults share; each test leaves it healthy."""
    with start() as running:
        yield running
