"""A genuine pair of a tiny model on GPUs, judged by `fidelity` and timed; on one GPU its workers share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.evaluation.fidelity import FidelityResult, run_fidelity
from pdtrim_deploy.gpucheck.checks import Check, Figure
from pdtrim_deploy.loadtest import LoadResult, Scenario, driver
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.serving import Cluster, Executors, ServeEnvironment, WorkerOptions, cluster_of

PAIR_S = 30.0  # a pair's start on one H100, CUDA graphs included; with less time none is begun
Loads = Mapping[int, Scenario]  # by clients


@dataclass(frozen=True)
class Pair:
    """How a bundle is served.

    Attributes:
        serve: SGLang's Python.
        small: of pool and batches, which start fast and leave room on a shared GPU; else of the sizes that SGLang
            chooses, as `serve` starts it.
        page_size: tokens; None: the default.
        device: cuda but in tests.

    """

    serve: Path
    prefill_args: tuple[str, ...] = ()
    decode_args: tuple[str, ...] = ()
    backend: str = "pdtrim_tcp"
    executors: Executors | None = None
    transport: Mapping[str, Any] = field(default_factory=dict)
    device: Literal["cpu", "cuda"] = "cuda"
    tp_prefill: int = 1
    tp_decode: int = 1
    small: bool = True
    page_size: int | None = None
    send_by_layer: bool = False

    def of(self, bundle: Bundle) -> Cluster:
        """Not yet started."""
        options = (WorkerOptions.beside_others if self.small else partial(WorkerOptions, share_gpus=True))(
            device=self.device,
            page_size=self.page_size,
            send_by_layer=self.send_by_layer,
            served_model_name=bundle.path.resolve().name,
            transfer_backend=self.backend,
            prefill_args=self.prefill_args,
            decode_args=self.decode_args,
            tp_prefill=self.tp_prefill,
            tp_decode=self.tp_decode,
        )
        return cluster_of(
            bundle,
            options=options,
            executors=self.executors,
            transport=self.transport,
            environment=ServeEnvironment(self.serve),
            start_timeout_s=150,
            say=print,
        )


def fidelity_check(name: str, bundle: Callable[[], Bundle], pair: Pair, **more: Any) -> Check:
    """A served pair against the oracle; `more` is Check's or `judged`'s."""
    loads, between = more.pop("loads", {}), more.pop("between", None)
    return Check(name, lambda: judged(bundle(), pair, loads, between), **({"seconds": PAIR_S} | more))


def judged(bundle: Bundle, pair: Pair, loads: Loads, between: Scenario | None = None) -> Figure:
    """Served log-probabilities against the oracle, and the median time between tokens under each load, ms.

    After the load `between` the same prompts are judged again: what a cache held of them has been moved by then.

    Raises:
        AssertionError: they differ by more than rounding, or the check could not tell wrong plans apart.

    """
    with pair.of(bundle) as cluster:
        result = _faithful(bundle, cluster)
        if between is not None:
            measured(cluster, {0: between})
            result = _faithful(bundle, cluster)
        times = itl(measured(cluster, loads))
    return {
        "worst_error_nats": result.max_logprob_error,
        "allowed_nats": result.tolerance,
        "controls_told_apart": sum(result.controls_detected.values()),
        "controls": len(result.controls),
        **times,
    }


def _faithful(bundle: Bundle, cluster: Cluster) -> FidelityResult:
    result = run_fidelity(bundle, cluster.url, Cache.default(), progress=print)
    if result.problems:
        raise AssertionError("; ".join(result.problems))
    return result


class Server(Protocol):
    """What answers at `url`: a cluster's router, or a worker."""

    @property
    def url(self) -> str: ...


def measured(cluster: Server, loads: Loads) -> dict[int, LoadResult]:
    """What a server does under each load, one after another.

    Raises:
        AssertionError: a request failed.

    """
    results = {
        clients: LoadResult.measure(driver("builtin"), "builtin", cluster.url, load) for clients, load in loads.items()
    }
    for result in results.values():
        if result.failed:
            raise AssertionError(f"{result.failed} of {result.requests} requests failed: {result.failure_details}")
    return results


def itl(results: Mapping[int, LoadResult], name: str = "") -> Figure:
    """Median time between tokens, ms, by clients."""
    return {f"{name}itl_ms_{clients}_clients": result.itl_ms.p50 or -1.0 for clients, result in results.items()}
