"""SGLang with its torch model and with the bundle's onnxruntime engines -> results/engines.json. `make bench-engines`.

Both pairs (1 prefill + 1 decode, one thread a worker) are up at once; idle workers sleep. Rounds of the same prompts
alternate between them, the order changing each time: a round's figure is a ratio, onnxruntime over torch, of medians
(TTFT, ITL), so that what else the machine does falls on both. The callback's overhead is what onnxruntime spends on a
`PagedAttention` node outside of the attention itself, from its own profile of the decode (or prefill) graph.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from __built import built
from __results import write
from pdtrim_builders.runtime_onnx import OnnxStage

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.loadtest import LoadResult, Scenario, driver
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.serving import Cluster, Executors, cluster_of

ROOT = Path(__file__).resolve().parent.parent
PAIRS = {"torch": Executors(), "onnxruntime": Executors("onnxruntime", "onnxruntime")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="with an onnx engine; by default recipes/smollm2-quick.yaml is built")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=2, help="of a pair in a round")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt", type=int, default=320)
    parser.add_argument("--output", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bundle = Bundle.open(Path(options.bundle)) if options.bundle else _built()
    rows = _callback(bundle, options)
    for row in rows:
        print("{stage} {tokens:4d} tokens: {node_us:6.0f} us a node, {outside_us:5.0f} outside attention".format(**row))
    with ExitStack() as stack:
        clusters = {}
        for name, executors in PAIRS.items():
            clusters[name] = stack.enter_context(cluster_of(bundle, executors=executors, say=print))
        for concurrency in options.concurrency:
            rows.append(_load(clusters, concurrency, options))
            print("concurrency {concurrency}: TTFT {ttft_ratio}, ITL {itl_ratio}".format(**rows[-1]))
    write("engines", options, rows)


def _built() -> Bundle:
    return built(Recipe.load(ROOT / "recipes" / "smollm2-quick.yaml"), ROOT / "out" / "bench-engines")


def _callback(bundle: Bundle, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Decode of 1 and 4 requests, prefill of a prompt; attention that only copies its queries."""
    torch.set_num_threads(1)
    rows = []
    for stage, tokens, runs in (("decode", 1, 100), ("decode", 4, 100), ("prefill", options.prompt, 8)):
        spent: list[float] = []

        def attend(layer: int, q: torch.Tensor, *_: torch.Tensor, spent: list[float] = spent) -> torch.Tensor:
            started = time.perf_counter()
            out = q.clone()
            spent.append(time.perf_counter() - started)
            return out

        with tempfile.TemporaryDirectory() as folder:
            graph = bundle.engine_dir("onnx", stage) / "model.onnx"  # type: ignore[arg-type]
            engine = OnnxStage(graph, attend, profile=Path(folder) / "profile")
            for _ in range(runs):
                engine.run(torch.randint(0, 1000, (tokens,)), torch.arange(tokens))
            times = engine.node_times()
        node, inside = (statistics.median(values) * 1e6 for values in (times["PagedAttention"], spent))
        graph_us = sum(map(sum, times.values())) / runs * 1e6
        rows.append(
            {
                "stage": stage,
                "tokens": tokens,
                "node_us": round(node, 1),
                "outside_us": round(node - inside, 1),
                "nodes": len(times["PagedAttention"]) // runs,
                "graph_us": round(graph_us, 1),
                "share": round((node - inside) * len(times["PagedAttention"]) / runs / graph_us, 4),
            }
        )
    return rows


def _load(clusters: dict[str, Cluster], concurrency: int, options: argparse.Namespace) -> dict[str, Any]:
    """Ratios of medians, one a round, and each pair's medians over all rounds."""
    drive, by_pair = driver("builtin"), {name: [] for name in clusters}
    lengths = {"input": (options.prompt,) * 2, "output": (options.output,) * 2}
    for number in range(-1, options.rounds):  # the first warms up
        seed = options.seed + 1000 * concurrency + number
        spec = Scenario.closed(max(options.requests, concurrency), concurrency, warmup=0, seed=seed, **lengths)
        for name in sorted(clusters, reverse=number % 2 == 0):
            result = LoadResult.of("builtin", [drive(clusters[name].url, spec)])
            if result.failed:
                raise SystemExit(f"{name}: {result.failed} requests failed: {result.failure_details}")
            if number >= 0:
                by_pair[name].append(result)

    def ratio(metric: str) -> dict[str, float]:
        medians = [[getattr(result, metric).p50 for result in by_pair[name]] for name in ("onnxruntime", "torch")]
        ratios = sorted(engine / eager for engine, eager in zip(*medians, strict=True))
        spread = {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}
        return {key: round(value, 3) for key, value in spread.items()}

    row: dict[str, Any] = {"concurrency": concurrency, "ttft_ratio": ratio("ttft_ms"), "itl_ratio": ratio("itl_ms")}
    row["load_average"] = round(os.getloadavg()[0], 1)  # what else the machine did
    for name, results in by_pair.items():
        for metric in ("ttft_ms", "itl_ms"):
            row[f"{name}_{metric}"] = round(statistics.median(getattr(result, metric).p50 for result in results), 1)
    return row


if __name__ == "__main__":
    main()
