"""TTFT with `serve --send-by-layer` and without it -> results/bylayer.json. `make bench-bylayer`.

Two pairs of one bundle (SmolLM2, all rows travel) are up at once and have the same prompts in turns, one at a time, KV
over a relay on loopback that lets `--link` through. A prompt is one chunk, so without the switch no row leaves before
its forward pass has ended. Predicted, at best: the shorter of forward pass and transfer costs no time.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from __built import built
from __results import write

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.loadtest import Scenario, Workers, driver
from pdtrim_deploy.loadtest.rounds import FIGURES, LEAST_ROUNDS, Ratio, Side, interleave, repeats
from pdtrim_deploy.plan.link import Link
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.serving import WorkerOptions, cluster_of, throttled

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "bench-bylayer"
SIDES = {"at the end": False, "by layer": True}
TTFT, TRANSFER = FIGURES["TTFT p50"], FIGURES["KV transfer time"]
KINDS = ("payload", "early")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wires", nargs="+", default=["native", "k4v3"], metavar="DTYPE")
    parser.add_argument("--prompts", nargs="+", type=int, default=[1024], help="tokens")
    parser.add_argument("--link", default="100Mbps", help="of KV as the pool holds it")
    parser.add_argument("--rounds", type=int, default=8, help=f"fewer than {LEAST_ROUNDS} are a trial: nothing written")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = [row for wire in options.wires for row in measure(bundle_of(wire), wire, options)]
    for row in rows:
        print("{wire}, {prompt_tokens} tokens: TTFT {ratio:.3f} ({low:.3f} - {high:.3f})".format(**row), end="")
        print(", predicted {predicted:.3f}; {early_bytes:,} of {bytes:,} bytes left early".format(**row))
    if options.rounds >= LEAST_ROUNDS:
        print(write("bylayer", options, rows))


def bundle_of(wire: str) -> Bundle:
    """SmolLM2 with all rows in this dtype."""
    recipe = Recipe.load(ROOT / "recipes" / "smollm2-dense.yaml")
    return built(recipe.changed("benchmarks/bylayer.py", "kv", wire_dtype=wire), OUT / wire)


def measure(bundle: Bundle, wire: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each prompt length."""
    with ExitStack() as stack:
        sides = {}
        for name, by_layer in SIDES.items():
            small = WorkerOptions.beside_others(
                served_model_name=name.replace(" ", "-"),
                send_by_layer=by_layer,
                prefill_args=("--chunked-prefill-size", str(max(options.prompts)), "--disable-radix-cache"),
            )
            cluster = stack.enter_context(
                throttled(cluster_of(bundle, options=small, say=print), Link.parse(options.link))
            )
            sides[name] = Side(cluster.url, Workers.of(cluster))
        time.sleep(5)
        busy = round(os.getloadavg()[0], 1)
        return [row(bundle, wire, tokens, sides, options) | {"load_average": busy} for tokens in options.prompts]


def row(bundle: Bundle, wire: str, tokens: int, sides: dict[str, Side], options: argparse.Namespace) -> dict[str, Any]:
    """TTFT by layer over TTFT at the end, round by round."""
    load = Scenario.closed(2, 1, (tokens,) * 2, (4, 4), seed=options.seed)
    workers = {name: side.workers for name, side in sides.items() if side.workers is not None}
    before = {name: known.read() for name, known in workers.items()}
    rounds = interleave(sides, repeats(load, options.rounds), driver("builtin"), "builtin", print)
    if failed := {name: result.failure_details for name, result in rounds.total.items() if result.failed}:
        raise SystemExit(f"requests failed: {failed}")
    end, layered = (rounds.by_round[name] for name in SIDES)
    each = [(TTFT(after) or 0) / (TTFT(first) or 1) for first, after in zip(end, layered, strict=True)]
    ratio = Ratio.of("TTFT p50", each if len(each) > 1 else each * 2)  # one round: a trial, without an interval
    ttft, transfer = (sum(read(result) or 0.0 for result in end) / len(end) for read in (TTFT, TRANSFER))
    sent = {name: workers[name].since(start, 2 * options.rounds) for name, start in before.items()}
    counted = {name: {kind: int(sent[name][f"pdtrim_kv_{kind}_bytes_sum", ""]) for kind in KINDS} for name in SIDES}
    return {
        "wire": wire,
        "prompt_tokens": tokens,
        "link": options.link,
        "ttft_ms": ttft,
        "transfer_ms": transfer,
        "layered_ttft_ms": sum(TTFT(result) or 0.0 for result in layered) / len(layered),
        "predicted": 1 - min(transfer, ttft - transfer) / ttft,
        "bytes": counted["by layer"]["payload"],
        "early_bytes": counted["by layer"]["early"],
    } | ratio.model_dump()


if __name__ == "__main__":
    main()
