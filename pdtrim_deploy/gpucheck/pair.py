"""A genuine pair of a tiny model on GPUs, judged by `fidelity` and timed; on one GPU its workers share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.evaluation.fidelity import run_fidelity
from pdtrim_deploy.gpucheck import tiny
from pdtrim_deploy.gpucheck.checks import Check, Figure
from pdtrim_deploy.loadtest import LoadResult, Scenario, driver
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.serving import Cluster, Executors, ServeEnvironment, WorkerOptions, cluster_of

PAIR_S = 30.0  # a pair's start on one H100, CUDA graphs included; with less time none is begun
CUT: Mapping[str, Any] = {"method": "all", "n_first": 4, "n_last": 64}
Loads = Mapping[int, Scenario]  # by clients


@dataclass(frozen=True)
class Pair:
    """How a bundle is served; `device` is cuda but in tests."""

    serve: Path
    prefill_args: tuple[str, ...] = ()
    decode_args: tuple[str, ...] = ()
    backend: str = "pdtrim_tcp"
    executors: Executors | None = None
    transport: Mapping[str, Any] = field(default_factory=dict)
    device: Literal["cpu", "cuda"] = "cuda"
    tp_prefill: int = 1
    tp_decode: int = 1

    def of(self, bundle: Bundle) -> Cluster:
        """Not yet started."""
        options = WorkerOptions.beside_others(
            device=self.device,
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


def tiny_bundle(
    folder: Path,
    kv: Mapping[str, Any],
    size: tiny.Size = tiny.Size(),  # noqa: B008
    architecture: str = "LlamaForCausalLM",
    **more: Any,
) -> Bundle:
    """A bundle of a random model and text of its own.

    float16, since its roundings are an eighth of bfloat16's: behind those, one wrong row of a random model is not seen.
    """
    folder.mkdir(exist_ok=True)
    corpus = f"dir:{tiny.text(folder / 'text')}"
    recipe = {
        "name": "tiny",
        "model": {"source": f"hf:{tiny.save(folder / 'model', size, architecture)}", "dtype": "float16"},
        "calibration": {"corpus": corpus, "sequences": 2, "length": 64},
        "evaluation": {"corpus": corpus, "sequences": 2, "prompt_tokens": 64, "continuation_tokens": 16},
        "pruning": {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 2},
        "kv": dict(kv),
    }
    build(Recipe.model_validate(recipe | more), folder / "bundle", Cache(folder / "cache"), print)
    return Bundle.open(folder / "bundle")


def lazily(folder: Path, kv: Mapping[str, Any], size: tiny.Size = tiny.Size(), **more: Any) -> Callable[[], Bundle]:  # noqa: B008
    """`tiny_bundle`, built when it is first called for."""
    return cache(partial(tiny_bundle, folder, kv, size, **more))


def fidelity_check(name: str, bundle: Callable[[], Bundle], pair: Pair, **more: Any) -> Check:
    """A served pair against the oracle; `more` is Check's or `judged`'s."""
    loads = more.pop("loads", {})
    return Check(name, lambda: judged(bundle(), pair, loads), **({"seconds": PAIR_S} | more))


def judged(bundle: Bundle, pair: Pair, loads: Loads) -> Figure:
    """Served log-probabilities against the oracle, and the median time between tokens under each load, ms.

    Raises:
        AssertionError: they differ by more than rounding, or the check could not tell wrong plans apart.

    """
    with pair.of(bundle) as cluster:
        result = run_fidelity(bundle, cluster.url, Cache.default(), progress=print)
        if result.problems:
            raise AssertionError("; ".join(result.problems))
        times = itl(measured(cluster, loads))
    return {
        "worst_error_nats": result.max_logprob_error,
        "allowed_nats": result.tolerance,
        "controls_told_apart": sum(result.controls_detected.values()),
        "controls": len(result.controls),
        **times,
    }


def measured(cluster: Cluster, loads: Loads) -> dict[int, LoadResult]:
    """What a cluster does under each load, one after another.

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
