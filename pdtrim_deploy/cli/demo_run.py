"""Build, judge, serve, check and load a pruned pair beside its dense control; every figure is measured here.

Production's pools are bfloat16, but SmolLM2 is served in float32, so that a token can be compared exactly on a CPU. So
a pair whose KV travels wider than it would from a bfloat16 pool gets a link that is faster by as much.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.bundle.environment import environment, versions_of
from pdtrim_deploy.loadtest import LoadResult, Scenario, Workers, driver
from pdtrim_deploy.loadtest.rounds import Rounds, Side, interleave, shares
from pdtrim_deploy.loadtest.scenario import Lengths
from pdtrim_deploy.local.atomic import write_atomic
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import ON_CPU
from pdtrim_deploy.pipeline import Note, build
from pdtrim_deploy.pipeline.model_card import refresh_cards
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.plan.blocks import BODY
from pdtrim_deploy.plan.link import Link
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.report.metrics import (
    FidelityFigures,
    LinkFigures,
    LoadFigures,
    MemoryFigures,
    Metrics,
    QualityFigures,
)
from pdtrim_deploy.report.plan_figures import PlanFigures, TransferFigures, from_bfloat16
from pdtrim_deploy.serving import Cluster, ServeEnvironment, WorkerOptions, cluster_of, throttled
from pdtrim_deploy.serving.metrics import scrape, total
from pdtrim_deploy.worker.decode_pool import SplitPool

PAIRS = ("dense", "pruned")
NEW_TOKENS = 8  # of each prompt of the fidelity check
# Gauges of SGLang 0.5.23: a pool's size in 2**30 bytes, and the tokens that it holds.
POOL_GB, POOL_TOKENS = "sglang:kv_cache_memory_usage_gb", "sglang:max_total_num_tokens"


@dataclass(frozen=True)
class Demo:
    """One run. `show` wraps steps and `note` reports progress inside them; `rounds` alternate between the pairs.

    `link` limits the speed of both pairs' KV as if pools were bfloat16; None: unlimited.
    """

    recipe: Recipe
    out: Path
    cache: Cache
    load: Scenario
    command: str
    show: Callable[[str], AbstractContextManager[object]]
    note: Note
    rounds: int = 4
    serve_python: Path | None = None
    link: Link | None = None

    def run(self) -> Metrics:
        """All of it; the metrics are written to OUT/report/metrics.json and to the reports of the pruned bundle.

        Raises:
            UserError: bad recipe, source or corpus, or no serve environment.
            ServingError: a server died or never served.

        """
        serve = ServeEnvironment.find(self.serve_python)
        bundles = {name: self._build(name) for name in PAIRS}
        quality = self._quality(bundles["pruned"])
        with ExitStack() as stack:
            clusters = {}
            for name in reversed(PAIRS):  # the pruned pair first: nothing else runs during the check
                with self.show(f"serve the {name} pair"):
                    clusters[name] = stack.enter_context(self._cluster(name, bundles[name], serve))
                if name == "pruned":
                    fidelity = self._fidelity(bundles[name], clusters[name])
            with self.show("load, in turns"):
                load = self._load(clusters)
            memory = {name: self._memory(bundles[name], clusters[name]) for name in PAIRS}
        plan = bundles["pruned"].plan
        results = load.total
        sent = {name: result.workers for name, result in results.items() if result.workers is not None}
        metrics = Metrics(
            plan=PlanFigures.of(plan),
            transfer=TransferFigures.of(plan, results["pruned"].prompt_tokens, sent["pruned"], sent["dense"]),
            quality=quality,
            fidelity=fidelity,
            load={name: LoadFigures.of(result) for name, result in results.items()},
            memory=memory,
            link=self._link_figures(bundles, results),
            ratios=tuple(load.ratios(*PAIRS)),
            dropped=tuple(load.dropped(*PAIRS)),
            environment=environment(self.command) | {"serve_versions": versions_of(serve.python)},
        )
        for folder in (self.out / "report", bundles["pruned"].reports_dir):
            metrics.write(folder / "metrics.json")
        return metrics

    def _build(self, name: str) -> Bundle:
        recipe = self.recipe
        if name == "dense":
            sections = {section: getattr(recipe, section) for section in ("model", "calibration", "evaluation")}
            recipe = Recipe(name=f"{recipe.name}-dense", **sections)
        with self.show(f"build the {name} bundle"):
            return build(recipe, self.out / name, self.cache, self.note)

    def _cluster(self, name: str, bundle: Bundle, serve: ServeEnvironment) -> AbstractContextManager[Cluster]:
        """Not yet started; layers that the plan cuts get pools of their own, sized for requests of the load."""
        cut = any(send.mode == "sparse" for send in bundle.plan.kv)
        split = SplitPool(isl=_longest(self.load.input), osl=_longest(self.load.output)) if cut else None
        # One request at a time: each stage computes alone, as on a machine of its own.
        threads = len(os.sched_getaffinity(0)) if self.load.arrivals.clients == 1 else None
        options = WorkerOptions.beside_others(served_model_name=name, split_pool=split, threads=threads)
        log_dir = self.out / "logs" / name
        cluster = cluster_of(bundle, options=options, environment=serve, log_dir=log_dir, say=self.note)
        return cluster if self.link is None else throttled(cluster, self._relay(self.link, bundle))

    def _relay(self, link: Link, bundle: Bundle) -> Link:
        """As fast as lets KV of a pool wider than bfloat16 take as long as a bfloat16 pool's does on `link`."""
        tokens = _longest(self.load.input)
        wider = bundle.plan.payload_bytes(tokens) / from_bfloat16(bundle.plan).payload_bytes(tokens)
        return Link(link.bits_per_s * max(1.0, wider))  # an fp8 pool is one that production has

    def _memory(self, bundle: Bundle, cluster: Cluster) -> MemoryFigures:
        """Weights by the files of the checkpoints, the pool by what the decode worker exports.

        A machine short of memory gives its workers pools of fewer tokens, so the pool is counted by the request.
        """
        weights = {
            f"{stage}_weights": sum(
                file.stat().st_size
                for pattern in ("*.safetensors", f"{BODY}/*.safetensors")
                for file in bundle.stage_dir(stage).glob(pattern)
            )
            for stage in STAGES
        }
        (decode,) = (worker for worker in cluster.workers if worker.spec.role == "decode")
        exported = scrape(decode.metrics_url)
        pool, tokens = total(exported, POOL_GB) * 2**30, total(exported, POOL_TOKENS)
        request = _longest(self.load.input) + _longest(self.load.output)
        return MemoryFigures(**weights, decode_request=round(pool / tokens * request) if tokens else 0)

    def _link_figures(self, bundles: dict[str, Bundle], results: dict[str, LoadResult]) -> LinkFigures | None:
        if self.link is None:
            return None
        return LinkFigures(
            speed=str(self.link),
            relays={name: str(self._relay(self.link, bundle)) for name, bundle in bundles.items()},
            ttft_share={name: _transfer_share(results[name]) for name in PAIRS},
        )

    def _quality(self, bundle: Bundle) -> QualityFigures:
        from pdtrim_deploy.evaluation.quality import judge_bundle

        with self.show("perplexity, dense and PD"):
            quality = judge_bundle(bundle, self.cache, environment(self.command), note=self.note)
        write_atomic(bundle.reports_dir / "eval.json", quality.model_dump_json(indent=2) + "\n")
        refresh_cards(bundle.path, quality)
        return QualityFigures.of(quality)

    def _fidelity(self, bundle: Bundle, cluster: Cluster) -> FidelityFigures:
        from pdtrim_deploy.evaluation.fidelity import run_fidelity

        compute = ON_CPU.fast(bundle.plan.model.kv_dtype)
        with self.show("fidelity of the served pair"):
            result = run_fidelity(bundle, cluster.url, self.cache, NEW_TOKENS, progress=self.note, compute=compute)
        provenance = {"seed": 0, "plan": bundle.plan.digest, "environment": environment(self.command)}
        provenance |= {"device": compute.names, "computed_in": compute.dtype}
        write_atomic(bundle.reports_dir / "fidelity.json", json.dumps(result.to_json() | provenance, indent=2) + "\n")
        return FidelityFigures(
            requests=result.requests,
            max_logprob_error=result.max_logprob_error,
            tolerance=result.tolerance,
            controls=len(result.controls),
            controls_detected=sum(result.controls_detected.values()),
            passed=result.passed,
        )

    def _load(self, clusters: dict[str, Cluster]) -> Rounds:
        """Rounds of the same prompts on both pairs, the order changing each time; and the KV bytes they sent."""
        sides = {name: Side(clusters[name].url, Workers.of(clusters[name])) for name in PAIRS}
        return interleave(sides, shares(self.load, self.rounds), driver("builtin"), "builtin", self.note)


def _longest(lengths: Lengths) -> int:
    """Of a `--prompt-tokens` or `--output-tokens`, fixed or uniform."""
    tokens = lengths.high or lengths.tokens
    assert tokens is not None
    return tokens


def _transfer_share(result: LoadResult) -> float | None:
    """Mean transfer time over median TTFT."""
    transfer = result.workers.transfer if result.workers else None
    return transfer.mean_ms / result.ttft_ms.p50 if transfer and result.ttft_ms.p50 else None
