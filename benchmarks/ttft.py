"""TTFT of served pairs whose prefill's last blocks are KV-only, with a tail, over dense's -> results/ttft.json.

`make bench-ttft`, on a machine that does nothing else. By `--model`, dequantised from a 4-bit file, in float32, KV
native. All pairs are up at once and answer one request at a time, in turns: dense, and one for each of `--prefills`.
Time does not depend on their weights, so they are fitted on little text. Predicted is the work of prefill's blocks
(`prefill_share`). Committed rows of other models, prefills and prompts stay. Starts of the servers differ by more than
the rounds of one: `--add` puts the rounds of this start to those of committed rows.
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

from __built import built
from __interleaved import in_turns, ratio, row_of
from __results import HERE, commit, committed, write

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.loadtest import Scenario
from pdtrim_deploy.loadtest.rounds import LEAST_ROUNDS, Ratio
from pdtrim_deploy.recipe import Recipe

DENSE, FIGURE = "dense", "TTFT p50"
OUT, UNITS = HERE.parent / "out" / "bench-ttft", HERE.parent / "recipes" / "units"
UNIT_OF = {"SmolLM2-135M": "smollm2", "Qwen2.5-Coder-0.5B": "qwen2.5-coder-0.5b"}
PREFILLS = {"SmolLM2-135M": ("10/32", "10/64", "12/64"), "Qwen2.5-Coder-0.5B": ("8/64",)}
KEY = ("model", "prompt", "blocks", "tail")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    prefills = "blocks that make K and V alone / tokens of the tail; memory for a pair of workers each"
    parser.add_argument("--model", default=next(iter(PREFILLS)), choices=PREFILLS)
    parser.add_argument("--prefills", nargs="+", type=_prefill, metavar="BLOCKS/TAIL", help=prefills)
    parser.add_argument("--prompts", type=int, nargs="+", default=[448, 1920], help="tokens")
    parser.add_argument("--requests", type=int, default=3, help="of a pair in each round")
    parser.add_argument("--rounds", type=int, default=8, help=f"fewer than {LEAST_ROUNDS} are a trial: nothing written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--add", action="store_true", help="rounds to those of committed rows, as of a further start")
    options = parser.parse_args()
    options.prefills = options.prefills or PREFILLS[options.model]
    bundles = {name: bundle_of(options.model, name) for name in (DENSE, *options.prefills)}
    loads = {
        str(prompt): Scenario.closed(options.requests, 1, (prompt,) * 2, (4, 4), seed=options.seed)
        for prompt in options.prompts
    }
    rows = []
    for prompt, (rounds, busy) in in_turns(bundles, loads, options.rounds).items():
        dense_ms = rounds.total[DENSE].ttft_ms.p50
        for name in options.prefills:
            plan = bundles[name].plan
            about = {
                "model": options.model,
                "prompt": int(prompt),
                "blocks": len(plan.kv_only_blocks),
                "tail": plan.kv_only_tail,
            }
            about |= {
                "starts": 1,
                "dense_ms": dense_ms,
                "predicted": plan.prefill_share(int(prompt)),
                "commit": commit(),
            }
            rows.append(row_of(ratio(FIGURE, name, DENSE, rounds), busy, **about))
            print(rows[-1])
    if options.rounds >= LEAST_ROUNDS:
        measured = {tuple(row[name] for name in KEY) for row in rows}
        older = committed(HERE / "results" / "ttft.json", options, ("requests", "rounds", "seed"))
        of_key = {tuple(row[name] for name in KEY): row for row in older}
        if options.add:
            rows = [_of_both(of_key.get(tuple(row[name] for name in KEY)), row) for row in rows]
        rows += [row for key, row in of_key.items() if key not in measured]
        options.model = options.prefills = options.prompts = options.add = None
        print(write("ttft", options, sorted(rows, key=_order)))


def _prefill(name: str) -> str:
    if re.fullmatch(r"[1-9]\d*/[1-9]\d*", name) is None:
        raise argparse.ArgumentTypeError(f"{name!r} is no BLOCKS/TAIL, such as 10/64")
    return name


def _of_both(older: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """The row with the rounds of an older one's starts too; dense's TTFT and the load are the newer one's."""
    if older is None:
        return row
    rounds = Ratio.of(FIGURE, [*older["rounds"], *row["rounds"]])
    commits = dict.fromkeys([*older["commit"].split(" + "), row["commit"]])
    return row | rounds.model_dump() | {"starts": older["starts"] + 1, "commit": " + ".join(commits)}


def _order(row: dict[str, Any]) -> tuple[int, int, int, int]:
    return [*PREFILLS].index(row["model"]), row["prompt"], -row["tail"], row["blocks"]


def bundle_of(model: str, name: str) -> Bundle:
    """Of the unpruned model, or with KV-only blocks and a tail: `12/64`."""
    healing = {"sequences": 2, "length": 64}
    if name != DENSE:
        healing |= dict(zip(("kv_only_blocks", "kv_only_tail"), map(int, name.split("/")), strict=True))
    OUT.mkdir(parents=True, exist_ok=True)
    units = [str(UNITS / f"{unit}.yaml") for unit in (f"model/{UNIT_OF[model]}", "calibration/brown")]
    file = OUT / "recipe.yaml"
    file.write_text(json.dumps({"include": units, "name": "ttft", "kv": {"method": "none"}, "healing": healing}))
    return built(Recipe.load(file), OUT / f"{model}-{name.replace('/', '-')}")


if __name__ == "__main__":
    main()
