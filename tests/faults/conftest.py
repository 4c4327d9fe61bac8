"""A cluster for all faults of a path: tiny random stages that differ, and proxies on the transport."""

from __future__ import annotations

import contextlib
import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from paths import PATHS, tiny_stages
from stand import BOOTSTRAP_S, WAITING_S, Stand, record

from pdtrim_deploy.serving import ServeEnvironment


def pytest_addoption(parser):
    parser.addoption("--soak-requests", type=int, help="requests of the soak test (200)")
    parser.addoption("--serve-python", type=Path, help="a Python with SGLang and the libraries of all transports")
    parser.addoption("--faults-out", type=Path, help="where the table of faults is written, as JSON")


@pytest.fixture(scope="session")
def stages_of(tiny_model, tmp_path_factory, cache):
    """`stages_of(path)`: a tiny bundle's stages, and those of another plan: `one` and `other`."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model(folder / "model", "Qwen3ForCausalLM", max_position_embeddings=2048, head_dim=32)

    @functools.cache
    def stages(path):
        lasts = {"one": 24, "other": 25}
        return {name: tiny_stages(model, folder / path.name / name, cache, path, n) for name, n in lasts.items()}

    return stages


@pytest.fixture(scope="session")
def stages(stages_of):
    """Those of the first path."""
    return stages_of(next(iter(PATHS.values())))


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
def start(stages_of, environment, tmp_path_factory, rows):
    """`start(path, transport)`: a cluster, healthy when `with` enters its block."""

    @contextlib.contextmanager
    def run(path, transport="tcp"):
        with pytest.MonkeyPatch.context() as patch:
            # SGLang's own deadlines, five minutes otherwise: workers inherit them
            patch.setenv("SGLANG_DISAGGREGATION_WAITING_TIMEOUT", str(WAITING_S))
            patch.setenv("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", str(BOOTSTRAP_S))
            logs = tmp_path_factory.mktemp("logs")
            with Stand(path, stages_of(path), logs, rows, transport, environment) as running:
                yield running

    return run


@pytest.fixture(scope="session", params=PATHS)
def stand(request, start):
    """The cluster that most faults of a path share; each test leaves it healthy."""
    with start(PATHS[request.param]) as running:
        yield running
