"""The simulation of a PD cluster against a measured pair, then larger than this machine -> results/simulation.json.

`make bench-simulation`. A bundle is served as 1 prefill + 1 decode worker. Closed loops at several lengths and
concurrencies give the workers' rates; other loads (open loops, mixed lengths) are measured and simulated with the
same requests, and the errors stand beside them. All loads take turns, in rounds, so that what else the machine does
falls on all of them. Rows with `workers` are simulated only: Llama-3.1-8B on 64 workers, from rates that are assumed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from __built import built
from __results import write

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.loadtest import LoadResult, Scenario, Workers, driver
from pdtrim_deploy.loadtest.scenario import SLO, Arrivals, Lengths
from pdtrim_deploy.loadtest.schedule import jobs
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.serving import cluster_of
from pdtrim_deploy.serving.spec import WorkerOptions
from pdtrim_deploy.simulation import Cluster, Load, simulate
from pdtrim_deploy.sizing import Link, Rates, subjects
from pdtrim_deploy.sizing.workers import Goal, rates_of, size

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "bench-simulation"
LOOPBACK = Link(8e9)  # 1 GB/s; the rates' transfer_ms holds what a transfer takes here
# Closed loops: requests, clients, prompt, answer. Short prompts and long answers keep the decode batch full.
CALIBRATION = {
    "short prompts": (2, 1, 64, 8),
    "long prompts": (2, 1, 384, 8),
    "1 at once": (2, 1, 64, 48),
    "2 at once": (2, 2, 64, 48),
    "4 at once": (4, 4, 64, 48),
    "8 at once": (8, 8, 64, 48),
}
# Open loops: arrivals a second, requests.
CHECKS = {"Poisson 0.5/s": (0.5, 12), "Poisson 0.8/s": (0.8, 20)}
PROMPT, ANSWER = Lengths.between(96, 352), Lengths.between(12, 36)
# Simulated only.
ASSUMED = ROOT / "scenarios" / "rates" / "llama-3.1-8b-assumed.yaml"
WORKERS, REQUESTS_64, PROMPT_64, ANSWER_64 = 64, 100_000, 4096, 256
SLO_64 = SLO(ttft_ms=1500.0, itl_ms=20.0)
LINKS = (("100Gbps", True), ("25Gbps", True), ("400Gbps", False), ("100Gbps", False))
COMPARED = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="by default recipes/smollm2-quick.yaml is built")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="simulate again what was measured last")
    options = parser.parse_args()
    bundle = Bundle.open(Path(options.bundle)) if options.bundle else _bundle()
    kept = OUT / "measured.json"
    if not options.again:
        kept.parent.mkdir(parents=True, exist_ok=True)
        measure(bundle, options, kept)
    loads = {n: [LoadResult.model_validate(r) for r in results] for n, results in json.loads(kept.read_text()).items()}
    limits = WorkerOptions()
    rates = Rates.measured(
        [(name, result) for name in CALIBRATION for result in loads[name]],
        max_running=limits.requests,
        pool_tokens=limits.pool_tokens,
    )
    print(rates.model_dump_json())
    rows = [check(name, loads[name], rates, bundle, options) for name in (*CALIBRATION, *CHECKS)]
    for row in rows:
        print(row["load"], {name: f"{error:+.0%}" for name, error in row["errors"].items()})
    worst = {kind: worst_of(rows, names) for kind, names in (("calibration", CALIBRATION), ("check", CHECKS))}
    print(worst)
    large = [
        cluster(name, *wires) for wires in LINKS for name in ("llama-3.1-8b", "recipes/llama-3.1-8b-balanced.yaml")
    ]
    write("simulation", options, [{"rates": rates.model_dump(), "worst_error": worst}, *rows, *large])


def _bundle() -> Bundle:
    """The one that bench-engines uses."""
    recipe = Recipe.load(ROOT / "recipes" / "smollm2-quick.yaml")
    return built(recipe, ROOT / "out" / "bench-engines")


def scenario(name: str, number: int, seed: int) -> Scenario:
    """Of one round."""
    seed += 1000 * number
    if name in CALIBRATION:
        requests, clients, prompt, answer = CALIBRATION[name]
        return Scenario.closed(requests, clients, (prompt,) * 2, (answer,) * 2, warmup=0, seed=seed)
    rate, requests = CHECKS[name]
    arrivals = Arrivals(kind="poisson", rate=rate)
    return Scenario(
        name="check", arrivals=arrivals, input=PROMPT, output=ANSWER, requests=requests, warmup=0, seed=seed
    )


def measure(bundle: Bundle, options: argparse.Namespace, kept: Path) -> None:
    """A result a round of every load, written after each round."""
    loads: dict[str, list[Any]] = {name: [] for name in (*CALIBRATION, *CHECKS)}
    drive = driver("builtin")
    with cluster_of(bundle, say=print) as cluster:
        workers = Workers.of(cluster)
        drive(cluster.url, Scenario.closed(4, 2, (192, 192), (8, 8), warmup=0, seed=options.seed + 99))
        for number in range(options.rounds):
            for name, results in loads.items():
                result = LoadResult.measure(
                    drive, "builtin", cluster.url, scenario(name, number, options.seed), workers
                )
                if result.failed:
                    raise SystemExit(f"{name}: {result.failed} requests failed: {result.failure_details}")
                print(f"{name}: TTFT {result.ttft_ms.p50} ITL {result.itl_ms.p50} {result.client.bottleneck or ''}")
                results.append(result.model_dump(mode="json"))
            kept.write_text(json.dumps(loads))


def check(
    name: str, results: list[LoadResult], rates: Rates, bundle: Bundle, options: argparse.Namespace
) -> dict[str, Any]:
    """Mean over rounds of what was measured, and of what the simulation of the same requests says."""
    pair = Cluster(1, 1, rates, bundle.plan.payload_bytes, LOOPBACK)
    pairs: dict[str, list[tuple[float, float]]] = {}
    for number, result in enumerate(results):
        asked_for = scenario(name, number, options.seed)
        load = Load.of(tuple(jobs(asked_for)), clients=asked_for.arrivals.clients)
        figures = simulate(pair, load).figures()
        for metric in COMPARED:
            for share in ("p50", "p90"):
                both = getattr(getattr(result, metric), share), getattr(getattr(figures, metric), share)
                pairs.setdefault(f"{metric} {share}", []).append(both)
        pairs.setdefault("output tokens/s", []).append((result.output_tokens_per_s, figures.output_tokens_per_s))
    means = {key: (fmean(a for a, _ in both), fmean(b for _, b in both)) for key, both in pairs.items()}
    return {
        "load": name,
        "used": "calibration" if name in CALIBRATION else "check",
        "measured": {key: round(a, 2) for key, (a, _) in means.items()},
        "simulated": {key: round(b, 2) for key, (_, b) in means.items()},
        "errors": {key: round(b / a - 1, 4) for key, (a, b) in means.items()},
    }


def cluster(target: str, link: str, each: bool) -> dict[str, Any]:
    """The largest rate that WORKERS workers carry within the SLO, prefill and decode split at best; then simulated."""
    (subject,) = subjects([str(ROOT / target) if "/" in target else target])
    rates = rates_of(subject.plan, Rates.load([ASSUMED]))
    size_bytes = subject.plan.payload_bytes(PROMPT_64)

    def goal(rate: float) -> Goal:
        return Goal(rate, PROMPT_64, ANSWER_64, SLO_64.ttft_ms / 1e3, SLO_64.itl_ms / 1e3, Link.parse(link), each)

    low, high = 0.0, 10_000.0
    while high - low > 0.1:
        rate = (low + high) / 2
        sized = size(rates, size_bytes, goal(rate))
        fits = sized.problem is None and sized.prefill_workers + sized.decode_workers <= WORKERS
        low, high = (rate, high) if fits else (low, rate)
    sized, started = size(rates, size_bytes, goal(low)), time.perf_counter()
    load = Load.poisson(low, REQUESTS_64, Lengths(tokens=PROMPT_64), Lengths(tokens=ANSWER_64))
    cluster = Cluster(
        sized.prefill_workers, sized.decode_workers, rates, subject.plan.payload_bytes, Link.parse(link), each
    )
    figures = simulate(cluster, load).figures(SLO_64)
    row = {
        "workers": WORKERS,
        "plan": subject.name if subject.kind == "recipe" else f"{subject.model} dense",
        "link": f"{link}, {'of each prefill worker' if each else 'one for all'}",
        "request_bytes": size_bytes,
        "rate": round(low, 1),
        "prefill_workers": sized.prefill_workers,
        "decode_workers": sized.decode_workers,
        "ttft_p95_bound_ms": round(sized.ttft_p95_ms, 1),
        "took_s": round(time.perf_counter() - started, 1),
    } | figures.model_dump()
    print(
        "{plan}, {link}: {rate}/s on {prefill_workers}+{decode_workers}, {good_share:.1%} good, {took_s} s".format(
            **row
        )
    )
    return row


def worst_of(rows: list[dict[str, Any]], names: dict[str, Any]) -> dict[str, float]:
    """The largest error of each figure over these loads."""
    chosen = [row["errors"] for row in rows if row["load"] in names]
    return {key: max((errors[key] for errors in chosen), key=abs) for key in chosen[0]}


if __name__ == "__main__":
    main()
