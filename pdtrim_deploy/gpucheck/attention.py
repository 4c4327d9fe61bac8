"""Decode's attention backends, with CUDA graphs and without, under a plan that cuts every layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pdtrim_deploy.gpucheck.bundles import CUT, lazily
from pdtrim_deploy.gpucheck.checks import Check
from pdtrim_deploy.gpucheck.machine import capability
from pdtrim_deploy.gpucheck.pair import Pair, fidelity_check
from pdtrim_deploy.loadtest import Scenario

CLIENTS = (1, 16)  # under which the time between tokens is taken
# By backend: the compute capabilities whose kernels SGLang has; none: all.
ATTENTION: dict[str, tuple[str, ...]] = {
    "triton": (), "torch_native": (), "flashinfer": (), "fa3": ("9.0",), "trtllm_mha": ("9.0", "10.0", "10.3"),
}  # fmt: skip
NO_GRAPHS = "--disable-cuda-graph"


def attention_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """Each backend as it is served, torch_native without CUDA graphs, against the oracle, with its time per token."""
    return _checks(pair or Pair(serve), folder, graphs=True)


def no_graphs_checks(serve: Path, folder: Path, pair: Pair | None = None) -> list[Check]:
    """The other backends without CUDA graphs: what a graph gains is the difference of the times per token."""
    return _checks(pair or Pair(serve), folder, graphs=False)


def _checks(pair: Pair, folder: Path, *, graphs: bool) -> list[Check]:
    bundle, device, checks = lazily(folder, CUT), capability(), []
    loads = {n: Scenario.closed(4 * n, n, (256, 256), (64, 64), warmup=2, deadline_s=120) for n in CLIENTS}
    for backend, capabilities in ATTENTION.items():
        plain = not graphs or backend == "torch_native"
        if plain and graphs == (backend != "torch_native"):
            continue
        variant = replace(pair, decode_args=("--attention-backend", backend, *((NO_GRAPHS,) if plain else ())))
        skip = f"SGLang has no such attention for compute capability {device or 'unknown'}"
        name = f"attention: {backend}, {'no' if plain else 'full'} graphs"
        served = not capabilities or device in capabilities
        checks.append(fidelity_check(name, bundle, variant, loads=loads, skip="" if served else skip))
    return checks
