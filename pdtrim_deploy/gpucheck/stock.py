"""SGLang as it is, without our plugin: one worker that prefills and decodes, with the options of a pair's."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.errors import ServingError
from pdtrim_deploy.gpucheck.pair import Pair
from pdtrim_deploy.serving.commands import worker_command, worker_environment
from pdtrim_deploy.serving.probe import is_healthy
from pdtrim_deploy.serving.process import ServerProcess, stop_all
from pdtrim_deploy.serving.spec import STOP_S

STOCK_S = 20.0  # its start on one H100
START_S = 150.0
OF_PAIRS = (  # options with a value each that only a worker of a pair has
    "--disaggregation-mode", "--disaggregation-transfer-backend", "--disaggregation-bootstrap-port",
)  # fmt: skip


@dataclass(frozen=True)
class StockServer:
    """One that serves at `url`."""

    url: str


@contextlib.contextmanager
def stock_server(pair: Pair, bundle: Bundle) -> Iterator[StockServer]:
    """The bundle's prefill model, which is the whole model where a plan drops nothing.

    Raises:
        ServingError: it ended, or was not ready in time.

    """
    worker = next(spec for spec in pair.of(bundle).spec.workers if spec.role == "prefill")
    with tempfile.TemporaryDirectory(prefix="pdtrim-stock-", ignore_cleanup_errors=True) as folder:
        environment = worker_environment(pair.serve, worker, 1, Path(folder)) | {"SGLANG_PLUGINS": "none"}
        command = stock_command(worker_command(pair.serve, worker))
        process = ServerProcess("SGLang alone", command, environment, Path(folder) / "log")
        try:
            deadline = time.monotonic() + START_S
            while not is_healthy(worker.url):
                if process.exit_code() is not None:
                    raise ServingError(process.obituary())
                if time.monotonic() > deadline:
                    raise ServingError(f"SGLang alone was not ready within {START_S:.0f} s")
                time.sleep(0.2)
            yield StockServer(worker.url)
        finally:
            stop_all([process], STOP_S[worker.options.device])


def stock_command(command: list[str]) -> list[str]:
    """A worker's command without what makes it half of a pair."""
    dropped = {place + step for place, word in enumerate(command) if word in OF_PAIRS for step in (0, 1)}
    return [word for place, word in enumerate(command) if place not in dropped]
