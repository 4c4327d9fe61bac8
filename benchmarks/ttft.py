"""TTFT of served pairs whose prefill's last blocks are KV-only, with a tail, over dense's -> results/ttft.json.

`make bench-ttft`, on a machine that does nothing else. SmolLM2-135M, dequantised from Q4_1, in float32, KV native.
All pairs are up at once and answer one request at a time, in turns: dense, and one for each number of blocks that make
K and V alone. Time does not depend on their weights, so they are fitted on little text. Predicted is the work of
prefill's blocks (`prefill_share`).
"""

from __future__ import annotations

import argparse

from __built import built
from __interleaved import in_turns, ratio, row_of
from __results import HERE, write

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.loadtest import Scenario
from pdtrim_deploy.loadtest.rounds import LEAST_ROUNDS
from pdtrim_deploy.recipe import Recipe

DENSE, FIGURE = "dense", "TTFT p50"
OUT = HERE.parent / "out" / "bench-ttft"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 10, 12], help="that make K and V alone")
    parser.add_argument("--tail", type=int, default=128, help="tokens")
    parser.add_argument("--prompts", type=int, nargs="+", default=[448, 1920], help="tokens")
    parser.add_argument("--requests", type=int, default=3, help="of a pair in each round")
    parser.add_argument("--rounds", type=int, default=8, help=f"fewer than {LEAST_ROUNDS} are a trial: nothing written")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pairs = {DENSE: 0} | {f"{blocks} blocks": blocks for blocks in options.blocks}
    bundles = {name: bundle_of(name, blocks, options.tail) for name, blocks in pairs.items()}
    loads = {
        str(prompt): Scenario.closed(options.requests, 1, (prompt,) * 2, (4, 4), seed=options.seed)
        for prompt in options.prompts
    }
    rows = []
    for prompt, (rounds, busy) in in_turns(bundles, loads, options.rounds).items():
        dense_ms = rounds.total[DENSE].ttft_ms.p50
        for name, bundle in bundles.items():
            if name != DENSE:
                about = {"prompt": int(prompt), "blocks": pairs[name], "tail": options.tail, "dense_ms": dense_ms}
                about["predicted"] = bundle.plan.prefill_share(int(prompt))
                rows.append(row_of(ratio(FIGURE, name, DENSE, rounds), busy, **about))
                print(rows[-1])
    if options.rounds >= LEAST_ROUNDS:
        print(write("ttft", options, rows))


def bundle_of(name: str, blocks: int, tail: int) -> Bundle:
    """A pair's bundle; without KV-only blocks of the unpruned model."""
    recipe = Recipe.load(HERE.parent / "recipes" / "smollm2-dense.yaml")
    if blocks:
        healing = {"kv_only_blocks": blocks, "kv_only_tail": tail, "sequences": 2, "length": 64}
        recipe = recipe.changed("benchmarks/ttft.py", "healing", **healing)
    return built(recipe, OUT / name.replace(" ", "-"))


if __name__ == "__main__":
    main()
