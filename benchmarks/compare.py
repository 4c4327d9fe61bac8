"""Blocks removed, KV cut, and both, against dense in interleaved rounds -> results/compare.json. `make bench-compare`.

The pairs of a part, dense among them, are up at once and take the same load in turns, on a machine that does nothing
else; four of them take 16 GB. Two parts, each with servers of its own:

decode: short prompts, long answers, many at once, so that model compute dominates. Predicted from the weights that a
request passes through: blocks by stage, and the LM head, which no pruning takes away. A pair with fewer blocks removed
tells how a step's time falls with blocks: what a line through the three leaves at no block is no block's time.
transfer: long prompts, one at a time, KV over a relay on loopback that lets 100 Mb/s through. Predicted: the bytes.

Which blocks go makes no difference to speed: they are chosen by cosine, and nothing here is about quality.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Any

from __built import built
from __interleaved import in_turns, ratio, row_of
from __results import write
from safetensors import safe_open

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.loadtest import Scenario
from pdtrim_deploy.loadtest.rounds import LEAST_ROUNDS, Rounds
from pdtrim_deploy.plan.link import Link
from pdtrim_deploy.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "bench-compare"
DENSE, HALF = "dense", "half of the blocks"
PARTS = {"decode": (DENSE, HALF, "blocks"), "transfer": (DENSE, "blocks", "KV", "both")}
"""The pairs of each part; HALF has half as many blocks removed as "blocks" and "both"."""


@dataclass(frozen=True)
class Weights:
    """Multiply-adds of one token: all blocks of each stage, and the LM head."""

    prefill: int
    decode: int
    head: int

    @classmethod
    def of(cls, bundle: Bundle) -> Weights:
        """Matrices in the stage checkpoints; attention over so few tokens is left out."""
        blocks, head = zip(*(_matrices(folder) for folder in (bundle.prefill_dir, bundle.decode_dir)), strict=True)
        return cls(*blocks, head[1])

    def request(self, prompt: int, answer: int) -> int:
        """Of a whole request: prefill gives the first token."""
        return prompt * self.prefill + self.head + (answer - 1) * (self.decode + self.head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=6, help=f"fewer than {LEAST_ROUNDS} are a trial: nothing written")
    parser.add_argument("--prefill-blocks", type=int, default=2, help="removed")
    parser.add_argument("--decode-blocks", type=int, default=8, help="removed")
    parser.add_argument("--batch", type=int, default=8, help="of part decode")
    parser.add_argument("--answer", type=int, default=64, help="tokens, of part decode")
    parser.add_argument("--prompt", type=int, default=768, help="tokens, of part transfer")
    parser.add_argument("--link", default="100Mbps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bundles = {name: bundle_of(name, options) for name in (DENSE, HALF, "blocks", "KV", "both")}
    measure = {"decode": decode, "transfer": transfer}
    rows = [
        row for part in options.parts for row in measure[part]({name: bundles[name] for name in PARTS[part]}, options)
    ]
    for row in rows:
        print(row)
    if options.rounds >= LEAST_ROUNDS:
        print(write("compare", options, rows))


def bundle_of(name: str, options: argparse.Namespace) -> Bundle:
    """A pair's bundle. Where KV is cut, only first 4 and last 128 prompt tokens travel, in the pool's dtype."""
    recipe = Recipe.load(ROOT / "recipes" / "smollm2-dense.yaml")
    removed = {"prefill_blocks": options.prefill_blocks, "decode_blocks": options.decode_blocks}
    if name in (HALF, "blocks", "both"):
        counts = {stage: count // 2 for stage, count in removed.items()} if name == HALF else removed
        recipe = recipe.changed("benchmarks/compare.py", "pruning", method="cosine", **counts)
    if name in ("KV", "both"):
        recipe = recipe.changed("benchmarks/compare.py", "kv", method="all", n_first=4, n_last=128)
    folder = "-".join([*name.split(), *map(str, removed.values())])
    return built(recipe, OUT / folder)


def decode(bundles: dict[str, Bundle], options: argparse.Namespace) -> list[dict[str, Any]]:
    """ITL and output tokens a second, and what part of a step is no block's."""
    prompt = 8
    load = Scenario.closed(options.batch, options.batch, (prompt,) * 2, (options.answer,) * 2, seed=options.seed)
    rounds, busy = measured(bundles, load, options, None)
    weights = {name: Weights.of(bundle) for name, bundle in bundles.items()}
    dense, rows = weights[DENSE], list[dict[str, Any]]()
    for name, pair in weights.items():
        if name != DENSE:
            step = (pair.decode + pair.head) / (dense.decode + dense.head)
            whole = pair.request(prompt, options.answer) / dense.request(prompt, options.answer)
            predicted = {"ITL p50": step, "output tokens/s": 1 / whole}
            rows += [row("decode", name, figure, value, rounds, busy) for figure, value in predicted.items()]
    kept = [len(bundle.plan.decode_layers) for bundle in bundles.values()]
    steps = zip(*([result.itl_ms.p50 or 0.0 for result in rounds.by_round[name]] for name in bundles), strict=True)
    lines = [(times[0], *linear_regression(kept, times)) for times in steps]
    line = {"part": "step", "blocks": kept, "head_of_weights": dense.head / (dense.decode + dense.head)}
    line |= {"itl_ms": [rounds.total[name].itl_ms.p50 for name in bundles]}
    return [*rows, line | {"outside_blocks": [outside / whole for whole, _, outside in lines]}]


def transfer(bundles: dict[str, Bundle], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Transfer time, from the first chunk's queueing to the last one's acknowledgement; TTFT and E2E."""
    load = Scenario.closed(2, 1, (options.prompt,) * 2, (4, 4), seed=options.seed)
    rounds, busy = measured(bundles, load, options, Link.parse(options.link))
    sent = {name: rounds.total[name].workers for name in bundles}
    sizes = {name: workers.payload_bytes / workers.requests for name, workers in sent.items() if workers is not None}
    planned = {name: bundle.plan.payload_bytes(options.prompt) for name, bundle in bundles.items()}
    if sizes != planned:
        raise SystemExit(f"{sizes} bytes a request were sent, the plans say {planned}")
    rows = list[dict[str, Any]]()
    for name in bundles:
        if name == DENSE:
            continue
        share = planned[name] / planned[DENSE]
        rows.append(row("transfer", name, "KV transfer time", share, rounds, busy))
        rows += [row("transfer", name, figure, None, rounds, busy) for figure in ("TTFT p50", "E2E p50")]
    return rows


def measured(
    bundles: dict[str, Bundle], load: Scenario, options: argparse.Namespace, link: Link | None
) -> tuple[Rounds, float]:
    """All rounds on all these pairs, and the load average before them."""
    return in_turns(bundles, {"": load}, options.rounds, link)[""]


def row(part: str, name: str, figure: str, predicted: float | None, rounds: Rounds, busy: float) -> dict[str, Any]:
    """A pair's figure over dense's."""
    return row_of(ratio(figure, name, DENSE, rounds), busy, part=part, pair=name, predicted=predicted)


def _matrices(folder: Path) -> tuple[int, int]:
    """Weights of all blocks' matrices, and of the LM head (the embedding, where it is tied to it)."""
    blocks, head = 0, {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                shape = tensors.get_slice(name).get_shape()
                size = shape[0] * shape[1] if len(shape) == 2 else 0
                if name.startswith("model.layers."):
                    blocks += size
                elif size:
                    head[name] = size
    return blocks, head.get("lm_head.weight") or head["model.embed_tokens.weight"]


if __name__ == "__main__":
    main()
