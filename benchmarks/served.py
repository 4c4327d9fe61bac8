"""Every wire dtype served by genuine SGLang -> results/served.json. `make bench-served`.

A bundle's stage models with its KV rules in each wire dtype, and in all of them at once: a pair is started (pages of
16 tokens, chunks of 64), prompts of odd lengths are sent and the bytes that its prefill worker counted are compared
with the plan's arithmetic; then the fidelity check runs on the same pair.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
from __built import built
from __results import HERE, commit, write

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.evaluation.fidelity import run_fidelity
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.plan.wire import WIRE_DTYPES
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.serving import Cluster, WorkerOptions, cluster_of
from pdtrim_deploy.serving.metrics import scrape

ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "tests"))
from bundle_variants import all_in, mixed, variant  # noqa: E402

LENGTHS = (1, 3, 64, 97, 144, 200, 333)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="by default recipes/smollm2-quick.yaml is built")
    parser.add_argument("--wires", nargs="+", help="only these are served; rows of the others stay")
    parser.add_argument("--tokens", type=int, default=8, help="generated for each prompt of the fidelity check")
    options = parser.parse_args()
    bundle = Bundle.open(Path(options.bundle)) if options.bundle else _built()
    rules = {wire: all_in(wire, bundle) for wire in WIRE_DTYPES} | {"all": mixed(bundle)}
    if unknown := set(options.wires or ()) - set(rules):
        parser.error(f"--wires {', '.join(sorted(unknown))}: choose from {', '.join(rules)}")
    stay = json.loads((HERE / "results" / "served.json").read_text())["rows"] if options.wires else []
    by_wire = {row["wire"]: row for row in stay}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.wires or rules:
            by_wire[name] = _serve(name, variant(bundle, rules[name], Path(folder) / name), options.tokens)
            print("{wire}: {counted} of {planned} bytes, {error:.1e} nats of {allowed:.1e}".format(**by_wire[name]))
    rows = [by_wire[name] for name in rules if name in by_wire]
    write("served", options, rows)
    if wrong := [row["wire"] for row in rows if row["counted"] != row["planned"] or not row["passed"]]:
        raise SystemExit(f"not as planned: {', '.join(wrong)}")


def _built() -> Bundle:
    recipe = Recipe.load(ROOT / "recipes" / "smollm2-quick.yaml")
    return built(recipe, ROOT / "out" / "bench-served")


def _serve(name: str, bundle: Bundle, tokens: int) -> dict[str, Any]:
    options = WorkerOptions(page_size=16, chunked_prefill_size=64)
    with cluster_of(bundle, options=options, say=print) as cluster:
        before = _payload(cluster)
        for length in LENGTHS:
            prompt = list(range(500, 500 + length))
            body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 2, "temperature": 0}}
            httpx.post(f"{cluster.url}/generate", json=body, timeout=120).raise_for_status()
        counted = _payload(cluster) - before
        result = run_fidelity(bundle, cluster.url, Cache.default(), new_tokens=tokens)
    return {
        "wire": name,
        "requests": len(LENGTHS),
        "counted": int(counted),
        "planned": sum(map(bundle.plan.payload_bytes, LENGTHS)),
        "dense": sum(map(bundle.plan.dense_bytes, LENGTHS)),
        "prompts": result.requests,
        "error": result.max_logprob_error,
        "allowed": result.tolerance,
        "controls": len(result.controls),
        "controls_detected": sum(result.controls_detected.values()),
        "passed": result.passed,
        "problems": result.problems,
        "commit": commit(),
    }


def _payload(cluster: Cluster) -> float:
    return sum(sample.value for sample in scrape(cluster.workers[0].metrics_url).get("pdtrim_kv_payload_bytes_sum", ()))


if __name__ == "__main__":
    main()
