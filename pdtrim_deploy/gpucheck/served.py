"""Served pairs on GPUs, judged by `fidelity` and timed: attention backends, SmolLM2, ITL, transports, TensorRT.

Each row starts a genuine pair; on one GPU its workers share it. Models are random ones but for SmolLM2, which is taken
from the cache of models.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.fidelity import run_fidelity
from pdtrim_deploy.gpucheck import tiny
from pdtrim_deploy.gpucheck.machine import capability
from pdtrim_deploy.gpucheck.row import Row
from pdtrim_deploy.loadtest import LoadResult, Scenario, driver
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.plan.wire import SMALLER_THAN_FP8
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.targets import TargetsSection
from pdtrim_deploy.serving import Cluster, Executors, ServeEnvironment, WorkerOptions, cluster_of

Figure = dict[str, float | int | str]
RECIPES = Path(__file__).resolve().parents[2] / "recipes"  # of a clone
CUT: Mapping[str, Any] = {"method": "all", "n_first": 4, "n_last": 64}
CLIENTS = (1, 16)  # under which the time between tokens is taken
WIDE = tiny.Size(16, 1024, 4096, 16, 8)  # 0.25 billion parameters: large enough that a step is not all launches
# Decode's attention under a plan that cuts layers, and the compute capabilities whose kernels SGLang has.
ATTENTION: dict[str, tuple[str, ...]] = {
    "triton": (), "fa3": ("9.0",), "trtllm_mha": ("9.0", "10.0", "10.3"), "flashinfer": (), "torch_native": (),
}  # fmt: skip


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

    def of(self, bundle: Bundle) -> Cluster:
        """Not yet started."""
        options = WorkerOptions.beside_others(
            device=self.device,
            served_model_name=bundle.path.resolve().name,
            transfer_backend=self.backend,
            prefill_args=self.prefill_args,
            decode_args=self.decode_args,
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


def attention_rows(serve: Path, pair: Pair | None = None) -> Iterator[Row]:
    """A tiny pair under each attention backend of decode, with CUDA graphs and without, against the oracle."""
    pair = pair or Pair(serve)
    with tempfile.TemporaryDirectory() as folder:
        bundle = tiny_bundle(Path(folder), CUT)
        for name, words in backends().items():
            if words is None:
                yield Row(f"served tiny pair: {name}", "skipped", "SGLang has no such attention for this device")
                continue
            yield _row(f"served tiny pair: {name}", partial(judged, bundle, replace(pair, decode_args=words)))


def fp8_pool_rows(serve: Path, pair: Pair | None = None) -> Iterator[Row]:
    """Tiny pairs with fp8 KV pools, each wire dtype once, whole and cut layers in turn, against the oracle.

    As in the oracle, prefill's torch_native reads a chunk's own rows after they were rounded (Triton before), and no
    query is rounded (fa3 and trtllm_mha round it).
    """
    prefill, decode = (("--attention-backend", backend) for backend in ("torch_native", "triton"))
    pair = replace(pair or Pair(serve), prefill_args=prefill, decode_args=decode)
    with tempfile.TemporaryDirectory() as folder:
        for place, wire in enumerate(SMALLER_THAN_FP8):
            rule = {"method": "none"} if place % 2 else CUT
            bundle = tiny_bundle(Path(folder) / wire, {**rule, "wire_dtype": wire, "pool_dtype": "fp8_e4m3"})
            yield _row(f"served tiny pair, fp8 pool: {wire}, {rule['method']} cut", partial(judged, bundle, pair))


def speculation_rows(serve: Path, pair: Pair | None = None) -> Iterator[Row]:
    """Tiny pairs without cut layers whose decode verifies drafted tokens, against the oracle.

    EAGLE's draft model is a random one: its KV travels, and hardly a token of it is accepted.
    """
    pair = pair or Pair(serve)
    with tempfile.TemporaryDirectory() as folder:
        bundle = tiny_bundle(Path(folder), {"method": "none", "wire_dtype": "int8"})
        draft = tiny.save_draft(Path(folder) / "draft")
        # one branch, since SGLang verifies trees of more in pages of one token alone
        ngram = ("--speculative-algorithm", "NGRAM", "--speculative-ngram-max-bfs-breadth", "1")
        eagle = (
            *("--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", str(draft)),
            *("--speculative-num-steps", "2", "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "3"),
        )
        for name, both, decode in (("NGRAM on decode", (), ngram), ("EAGLE", eagle, eagle)):
            way = replace(pair, prefill_args=(*pair.prefill_args, *both), decode_args=(*pair.decode_args, *decode))
            yield _row(f"served tiny pair, int8: {name}", partial(judged, bundle, way))


def window_rows(serve: Path, pair: Pair | None = None) -> Iterator[Row]:
    """Tiny pairs of models with sliding windows, in SGLang's pool of windows where it has one, against the oracle."""
    pair = pair or Pair(serve)
    with tempfile.TemporaryDirectory() as folder:
        for architecture in tiny.WINDOWED:
            name = f"served tiny pair, int8 and windows: {architecture.removesuffix('ForCausalLM')}"
            yield _row(name, partial(_windows_judged, Path(folder), architecture, pair))


def latent_rows(serve: Path, pair: Pair | None = None) -> Iterator[Row]:
    """Tiny pairs of models with latents (MLA), under the attention that SGLang takes for them, against the oracle."""
    pair = pair or Pair(serve)
    with tempfile.TemporaryDirectory() as folder:
        for architecture, wire in product(tiny.LATENT, ("native", "int4")):
            kv = {"method": "none", "wire_dtype": wire}
            name = f"served tiny pair, latents in {wire}: {architecture.removesuffix('ForCausalLM')}"
            place = Path(folder) / f"{architecture}-{wire}"
            yield _row(name, partial(_latents_judged, place, kv, architecture, pair))


def _latents_judged(folder: Path, kv: Mapping[str, Any], architecture: str, pair: Pair) -> Figure:
    return judged(tiny_bundle(folder, kv, architecture=architecture, pruning={}), pair)


def _windows_judged(folder: Path, architecture: str, pair: Pair) -> Figure:
    kv = {"method": "none", "wire_dtype": "int8"}
    return judged(tiny_bundle(folder / architecture, kv, architecture=architecture, pruning={}), pair)


def backends() -> dict[str, tuple[str, ...] | None]:
    """Decode's options by name: each backend with full CUDA graphs and without; None where this device has it not."""
    options, device = dict[str, tuple[str, ...] | None](), capability()
    for backend, capabilities in ATTENTION.items():
        for graphs in ("full graphs", "no graphs") if backend != "torch_native" else ("no graphs",):
            words = ("--attention-backend", backend, *(("--disable-cuda-graph",) if graphs == "no graphs" else ()))
            options[f"{backend}, {graphs}"] = words if not capabilities or device in capabilities else None
    return options


def smollm2_rows(serve: Path, pair: Pair | None = None) -> Iterator[Row]:
    """SmolLM2 pruned and quantised, as `serve` starts it, against the oracle."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        try:
            recipe = Recipe.load(RECIPES / "smollm2-quick.yaml").model_copy(update={"targets": TargetsSection()})
            bundle = build(recipe, Path(folder) / "bundle", Cache.default(), print)
        except (UserError, OSError) as error:
            yield Row("served SmolLM2 pair", "skipped", f"the model or its text is not here: {_sentence(error)}")
            return
        yield _row("served SmolLM2 pair", partial(judged, bundle, pair or Pair(serve)))


def itl_rows(serve: Path, pair: Pair | None = None) -> Iterator[Row]:
    """Time between tokens of a plan that cuts every layer beside the dense plan of the same model, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        bundles = {
            name: tiny_bundle(Path(folder) / name, kv, WIDE)
            for name, kv in (("cut", CUT), ("dense", {"method": "none"}))
        }
        loads = {n: Scenario.closed(4 * n, n, (512, 512), (64, 64), warmup=2, deadline_s=120) for n in CLIENTS}
        yield _row("ITL beside stock dense", partial(timed, bundles, pair or Pair(serve), loads))


def nixl_rows(serve: Path, pair: Pair | None = None) -> Iterator[Row]:
    """TTFT of long prompts by our transfer beside SGLang's own NIXL."""
    yield from _transfer_rows(pair or Pair(serve), "nixl")


def mooncake_rows(serve: Path, pair: Pair | None = None) -> Iterator[Row]:
    """TTFT of long prompts by our transfer beside SGLang's own Mooncake."""
    yield from _transfer_rows(pair or Pair(serve), "mooncake")


def tensorrt_rows(serve: Path) -> Iterator[Row]:
    """Engines of both stages built here, and served."""
    with tempfile.TemporaryDirectory() as folder:
        bundles: list[Bundle] = []

        def make() -> Figure:
            bundles.append(tiny_bundle(Path(folder), CUT, targets={"tensorrt": {}}))
            return {"engines": len(bundles[0].manifest.engines)}

        yield _row("TensorRT: build", make)
        if bundles:
            pair = Pair(serve, executors=Executors("tensorrt", "tensorrt"))
            yield _row("TensorRT: served tiny pair", partial(judged, bundles[0], pair))


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


def judged(bundle: Bundle, pair: Pair) -> Figure:
    """Served log-probabilities against the oracle.

    Raises:
        AssertionError: they differ by more than rounding, or the check could not tell wrong plans apart.

    """
    with pair.of(bundle) as cluster:
        result = run_fidelity(bundle, cluster.url, Cache.default(), progress=print)
    if result.problems:
        raise AssertionError("; ".join(result.problems))
    return {
        "worst_error_nats": result.max_logprob_error,
        "allowed_nats": result.tolerance,
        "controls_told_apart": sum(result.controls_detected.values()),
        "controls": len(result.controls),
    }


def timed(bundles: Mapping[str, Bundle], pair: Pair, loads: Mapping[int, Scenario]) -> Figure:
    """Median time between tokens, ms, of each pair under each load (by clients); one pair at a time."""
    return {
        f"{name}_itl_ms_{clients}_clients": result.itl_ms.p50 or -1.0
        for name, bundle in bundles.items()
        for clients, result in _measured(pair, bundle, loads).items()
    }


def _transfer_rows(pair: Pair, library: str) -> Iterator[Row]:
    trusting = {"accept_unauthenticated": True}
    with tempfile.TemporaryDirectory() as folder:
        bundles = {
            "stock": tiny_bundle(Path(folder) / "dense", {"method": "none"}, WIDE),
            "k4v3": tiny_bundle(Path(folder) / "k4v3", {"method": "none", "wire_dtype": "k4v3"}, WIDE),
        }
        load = Scenario.closed(16, 1, (3000, 3000), (2, 2), warmup=2, deadline_s=120)
        ways = {
            f"stock {library}": (bundles["stock"], replace(pair, backend=library)),
            **{
                f"pdtrim_{library}, k4v3, {slots} slots": (
                    bundles["k4v3"],
                    replace(pair, backend=f"pdtrim_{library}", transport=trusting | {"slots": slots}),
                )
                for slots in (("host", "device") if pair.device == "cuda" else ("host",))
            },
            "pdtrim_tcp, k4v3": (bundles["k4v3"], pair),
        }
        for name, (bundle, way) in ways.items():
            yield _row(f"transfer of 3,000 tokens: {name}", partial(_ttft, way, bundle, load))


def _ttft(pair: Pair, bundle: Bundle, load: Scenario) -> Figure:
    return {"ttft_ms": _measured(pair, bundle, {1: load})[1].ttft_ms.p50 or -1.0}


def _measured(pair: Pair, bundle: Bundle, loads: Mapping[int, Scenario]) -> dict[int, LoadResult]:
    results = {}
    with pair.of(bundle) as cluster:
        for clients, load in loads.items():
            results[clients] = LoadResult.measure(driver("builtin"), "builtin", cluster.url, load)
    for result in results.values():
        if result.failed:
            raise AssertionError(f"{result.failed} of {result.requests} requests failed: {result.failure_details}")
    return results


def _row(name: str, measure: Callable[[], Figure]) -> Row:
    """A check that raises has failed, and the others go on."""
    try:
        return Row(name, "run", figure=measure())
    except Exception as error:
        return Row(name, "failed", _sentence(error))


def _sentence(error: Exception) -> str:
    kind = "" if isinstance(error, AssertionError | UserError) else f"{type(error).__name__}: "
    return (kind + str(error)).strip().splitlines()[0][:300]
