"""Build, judge, serve, check and load a pruned pair beside its dense control; every figure is measured here."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from pdtrim_deploy.bundle import Bundle, write_atomic
from pdtrim_deploy.bundle.environment import environment, versions_of
from pdtrim_deploy.loadtest import Scenario, Workers, driver
from pdtrim_deploy.loadtest.rounds import Rounds, Side, interleave, shares
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.pipeline import Note, build
from pdtrim_deploy.pipeline.model_card import refresh_cards
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.report.metrics import (
    FidelityFigures,
    LoadFigures,
    Metrics,
    PlanFigures,
    QualityFigures,
    TransferFigures,
)
from pdtrim_deploy.serving import Cluster, ServeEnvironment, WorkerOptions, cluster_of

PAIRS = ("dense", "pruned")


@dataclass(frozen=True)
class Demo:
    """One run. `show` wraps steps and `note` says what goes on inside; `rounds` alternate between the pairs."""

    recipe: Recipe
    out: Path
    cache: Cache
    load: Scenario
    command: str
    show: Callable[[str], AbstractContextManager[object]]
    note: Note
    rounds: int = 4
    serve_python: Path | None = None

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
            for name in reversed(PAIRS):  # the pruned pair first: the check has the machine to itself
                bundle = bundles[name]
                options = WorkerOptions.beside_others(served_model_name=bundle.path.resolve().name)
                log_dir = self.out / "logs" / name
                starting = cluster_of(bundle, options=options, environment=serve, log_dir=log_dir, say=self.note)
                with self.show(f"serve the {name} pair"):
                    clusters[name] = stack.enter_context(starting)
                if name == "pruned":
                    fidelity = self._fidelity(bundles[name], clusters[name])
            with self.show("load, in turns"):
                load = self._load(clusters)
        plan = bundles["pruned"].plan
        results = load.total
        sent = {name: result.workers for name, result in results.items() if result.workers is not None}
        metrics = Metrics(
            plan=PlanFigures.of(plan),
            transfer=TransferFigures.of(plan, results["pruned"].prompt_tokens, sent["pruned"], sent["dense"]),
            quality=quality,
            fidelity=fidelity,
            load={name: LoadFigures.of(result) for name, result in results.items()},
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
            kept = {section: getattr(recipe, section) for section in ("model", "calibration", "evaluation")}
            recipe = Recipe(name=f"{recipe.name}-dense", **kept)
        with self.show(f"build the {name} bundle"):
            return build(recipe, self.out / name, self.cache, self.note)

    def _quality(self, bundle: Bundle) -> QualityFigures:
        from pdtrim_deploy.evaluation.quality import judge_bundle

        with self.show("perplexity, dense and PD"):
            found = judge_bundle(bundle, self.cache, environment(self.command), note=self.note)
        write_atomic(bundle.reports_dir / "eval.json", found.model_dump_json(indent=2) + "\n")
        refresh_cards(bundle.path, found)
        return QualityFigures(dense_ppl=found.dense.ppl, pd_ppl=found.pd.ppl, ratio=found.ratio)

    def _fidelity(self, bundle: Bundle, cluster: Cluster) -> FidelityFigures:
        from pdtrim_deploy.evaluation.fidelity import run_fidelity

        with self.show("fidelity of the served pair"):
            found = run_fidelity(bundle, cluster.url, self.cache, progress=self.note)
        made = {"seed": 0, "plan": bundle.plan.digest, "environment": environment(self.command)}
        write_atomic(bundle.reports_dir / "fidelity.json", json.dumps(found.to_json() | made, indent=2) + "\n")
        return FidelityFigures(
            requests=found.requests,
            max_logprob_error=found.max_logprob_error,
            tolerance=found.tolerance,
            controls=len(found.controls),
            controls_detected=sum(found.controls_detected.values()),
            passed=found.passed,
        )

    def _load(self, clusters: dict[str, Cluster]) -> Rounds:
        """Rounds of the same prompts on both pairs, the order changing each time; and the KV bytes they sent."""
        sides = {name: Side(clusters[name].url, Workers.of(clusters[name])) for name in PAIRS}
        return interleave(sides, shares(self.load, self.rounds), driver("builtin"), "builtin", self.note)
