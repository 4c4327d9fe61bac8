"""Pruned against dense in interleaved rounds, beside what the plan predicts -> results/compare.json.

`make bench-compare`.

Both pairs are up at once and take the same load in turns. Two parts, each with servers of its own:

decode: short prompts, long answers, many at once, so that model compute dominates. Predicted from the weights that a
request passes through: blocks by stage, and the LM head, which no pruning takes away.
transfer: long prompts, one at a time, KV over a relay on loopback that lets 100 Mb/s through. Predicted: the bytes.

Which blocks go makes no difference to speed: they are chosen by cosine, and nothing here is about quality.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from __results import write
from safetensors import safe_open

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.loadtest import Scenario, Workers, driver
from pdtrim_deploy.loadtest.rounds import FIGURES, LEAST_ROUNDS, Ratio, Rounds, Side, interleave, repeats
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.plan.link import Link
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.serving import WorkerOptions, cluster_of, throttled

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "bench-compare"
PAIRS = ("dense", "pruned")
# Share of what is predicted that shall be measured: of the saving by blocks, of the factor by bytes.
GOALS = {"decode": 0.9, "transfer": 0.8}


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
    parser.add_argument("--parts", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--rounds", type=int, default=8, help=f"fewer than {LEAST_ROUNDS} are a trial: nothing written")
    parser.add_argument("--prefill-blocks", type=int, default=2, help="removed")
    parser.add_argument("--decode-blocks", type=int, default=8, help="removed")
    parser.add_argument("--batch", type=int, default=8, help="of part decode")
    parser.add_argument("--answer", type=int, default=96, help="tokens, of part decode")
    parser.add_argument("--prompt", type=int, default=768, help="tokens, of part transfer")
    parser.add_argument("--link", default="100Mbps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bundles = {"dense": bundle_of(None), "pruned": bundle_of(options)}
    for name, bundle in bundles.items():
        print(f"{name}: {len(bundle.plan.prefill_layers)} + {len(bundle.plan.decode_layers)} blocks")
    rows = [row for part in options.parts for row in {"decode": decode, "transfer": transfer}[part](bundles, options)]
    for row in rows:
        print(
            "{figure}: predicted {predicted:.3f}, measured {ratio:.3f} ({low:.3f} - {high:.3f})".format(**row), end=""
        )
        print(", {of_saving:.2f} of the saving, {of_factor:.2f} of the factor".format(**row))
    if options.rounds >= LEAST_ROUNDS:
        print(write("compare", options, rows))


def bundle_of(options: argparse.Namespace | None) -> Bundle:
    """The dense bundle, or the pruned one: only first 4 and last 128 prompt tokens travel, in the pool's dtype."""
    recipe = Recipe.load(ROOT / "recipes" / "smollm2-dense.yaml")
    if options is None:
        return build(recipe, OUT / "dense", Cache.default(), print)
    blocks = {"prefill_blocks": options.prefill_blocks, "decode_blocks": options.decode_blocks}
    recipe = recipe.changed("benchmarks/compare.py", "pruning", method="cosine", **blocks)
    recipe = recipe.changed("benchmarks/compare.py", "kv", method="all", n_first=4, n_last=128)
    return build(recipe, OUT / "-".join(["pruned", *map(str, blocks.values())]), Cache.default(), print)


def decode(bundles: dict[str, Bundle], options: argparse.Namespace) -> list[dict[str, Any]]:
    """ITL and output tokens a second."""
    prompt = 8
    load = Scenario.closed(options.batch, options.batch, (prompt,) * 2, (options.answer,) * 2, seed=options.seed)
    rounds, busy = measured(bundles, load, options, None)
    dense, pruned = (Weights.of(bundles[name]) for name in PAIRS)
    step = (pruned.decode + pruned.head) / (dense.decode + dense.head)
    whole = pruned.request(prompt, options.answer) / dense.request(prompt, options.answer)
    more = {"load_average": busy, "blocks_alone": round(pruned.decode / dense.decode, 4)}
    return [row("decode", "ITL p50", step, rounds) | more, row("decode", "output tokens/s", 1 / whole, rounds) | more]


def transfer(bundles: dict[str, Bundle], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Transfer time, from the first chunk's queueing to the last one's acknowledgement."""
    load = Scenario.closed(2, 1, (options.prompt,) * 2, (4, 4), seed=options.seed)
    rounds, busy = measured(bundles, load, options, Link.parse(options.link))
    sent = {name: rounds.total[name].workers for name in PAIRS}
    sizes = {name: workers.payload_bytes / workers.requests for name, workers in sent.items() if workers is not None}
    planned = {name: bundle.plan.payload_bytes(options.prompt) for name, bundle in bundles.items()}
    if sizes != planned:
        raise SystemExit(f"{sizes} bytes a request were sent, the plans say {planned}")
    more = {"load_average": busy, "link": options.link, "bytes": planned}
    return [row("transfer", "KV transfer time", planned["pruned"] / planned["dense"], rounds) | more]


def measured(
    bundles: dict[str, Bundle], load: Scenario, options: argparse.Namespace, link: Link | None
) -> tuple[Rounds, float]:
    """All rounds on both pairs, and what else the machine did before them."""
    with ExitStack() as stack:
        sides = {}
        for name, bundle in bundles.items():
            starting = cluster_of(
                bundle, options=WorkerOptions.beside_others(served_model_name=bundle.path.resolve().name), say=print
            )
            cluster = stack.enter_context(throttled(starting, link) if link else starting)
            sides[name] = Side(cluster.url, Workers.of(cluster))
        time.sleep(5)
        busy = round(os.getloadavg()[0], 1)
        rounds = interleave(sides, repeats(load, options.rounds), driver("builtin"), "builtin", print)
    if failed := {name: result.failure_details for name, result in rounds.total.items() if result.failed}:
        raise SystemExit(f"requests failed: {failed}")
    return rounds, busy


def row(part: str, figure: str, predicted: float, rounds: Rounds) -> dict[str, Any]:
    """Pruned over dense; `of_saving` is of what lies between 1 and the prediction, `of_factor` of the factor itself."""
    read = FIGURES[figure]
    each = [(read(b) or 0) / (read(a) or 1) for a, b in zip(*(rounds.by_round[name] for name in PAIRS), strict=True)]
    ratio = Ratio.of(figure, each if len(each) > 1 else each * 2)  # one round: a trial, without an interval
    of_factor = predicted / ratio.ratio if predicted < 1 else ratio.ratio / predicted
    of_saving = (1 - ratio.ratio) / (1 - predicted)
    fraction = of_saving if part == "decode" else of_factor
    fields = {"part": part, "predicted": predicted, "of_saving": of_saving, "of_factor": of_factor}
    return fields | ratio.model_dump() | {"goal": GOALS[part], "reached": fraction >= GOALS[part]}


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
