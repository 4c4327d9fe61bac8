"""TTFT of served pairs whose prefill's last blocks are KV-only, with a tail, over dense's -> results/ttft.json.

`make bench-ttft`, on a machine that does nothing else. SmolLM2-135M, dequantised from Q4_1, in float32, KV native.
All pairs are up at once and answer one request at a time, in turns: dense, and one for each of `--prefills`. Time does
not depend on their weights, so they are fitted on little text. Predicted is the work of prefill's blocks
(`prefill_share`). Committed rows of other prefills and prompts stay.
"""

from __future__ import annotations

import argparse

from __built import built
from __interleaved import in_turns, ratio, row_of
from __results import HERE, commit, committed, write

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.loadtest import Scenario
from pdtrim_deploy.loadtest.rounds import LEAST_ROUNDS
from pdtrim_deploy.recipe import Recipe

DENSE, FIGURE = "dense", "TTFT p50"
OUT = HERE.parent / "out" / "bench-ttft"
PREFILLS = ("8/128", "10/128", "12/128", "10/64", "12/64")
KEY = ("prompt", "blocks", "tail")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    prefills = "blocks that make K and V alone / tokens of the tail; memory for a pair of workers each"
    parser.add_argument("--prefills", nargs="+", default=[*PREFILLS], metavar="BLOCKS/TAIL", help=prefills)
    parser.add_argument("--prompts", type=int, nargs="+", default=[448, 1920], help="tokens")
    parser.add_argument("--requests", type=int, default=3, help="of a pair in each round")
    parser.add_argument("--rounds", type=int, default=8, help=f"fewer than {LEAST_ROUNDS} are a trial: nothing written")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bundles = {name: bundle_of(name) for name in (DENSE, *options.prefills)}
    loads = {
        str(prompt): Scenario.closed(options.requests, 1, (prompt,) * 2, (4, 4), seed=options.seed)
        for prompt in options.prompts
    }
    rows = []
    for prompt, (rounds, busy) in in_turns(bundles, loads, options.rounds).items():
        dense_ms = rounds.total[DENSE].ttft_ms.p50
        for name in options.prefills:
            plan = bundles[name].plan
            about = {"prompt": int(prompt), "blocks": len(plan.kv_only_blocks), "tail": plan.kv_only_tail}
            about |= {"dense_ms": dense_ms, "predicted": plan.prefill_share(int(prompt)), "commit": commit()}
            rows.append(row_of(ratio(FIGURE, name, DENSE, rounds), busy, **about))
            print(rows[-1])
    if options.rounds >= LEAST_ROUNDS:
        measured = {tuple(row[name] for name in KEY) for row in rows}
        older = committed(HERE / "results" / "ttft.json", options, ("requests", "rounds", "seed"))
        rows += [row for row in older if tuple(row[name] for name in KEY) not in measured]
        options.prefills = options.prompts = None
        print(write("ttft", options, sorted(rows, key=lambda row: (row["prompt"], -row["tail"], row["blocks"]))))


def bundle_of(name: str) -> Bundle:
    """Of the unpruned model, or with KV-only blocks and a tail: `12/64`."""
    recipe = Recipe.load(HERE.parent / "recipes" / "smollm2-dense.yaml")
    if name != DENSE:
        blocks, tail = (int(number) for number in name.split("/"))
        healing = {"kv_only_blocks": blocks, "kv_only_tail": tail, "sequences": 2, "length": 64}
        recipe = recipe.changed("benchmarks/ttft.py", "healing", **healing)
    return built(recipe, OUT / name.replace("/", "-"))


if __name__ == "__main__":
    main()
