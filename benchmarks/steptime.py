"""How decode's step time falls with blocks removed -> results/steptime.json. `make bench-steptime`.

One step of SmolLM2-135M, dequantised from Q4_1, in float32, a token for each sequence behind its prompt: whole, and all
blocks without the LM head, which no pruning takes away (of this small model with its large vocabulary it costs as much
as eight blocks). The dense and all pruned models take turns, round by round. Which blocks go makes no difference: every
fourth does. `of_blocks` is dense over pruned, divided by 30 / (30 - n): 1 when time falls as the blocks do.
"""

from __future__ import annotations

import argparse
import time
from statistics import median, quantiles
from typing import Any

import torch
from __results import write

from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.surgery import keep_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--removed", type=int, nargs="+", default=[2, 4, 6, 8])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = load_model(resolve(DEFAULT_SOURCE, Cache.default()).path)
    rows = [row for batch in options.batches for row in measured(model, batch, options)]
    for row in rows:
        print(
            "batch {batch}, {removed} removed: step {step[median]:.3f} ({step[low]:.3f} - {step[high]:.3f}), "
            "blocks alone {blocks[median]:.3f} ({blocks[low]:.3f} - {blocks[high]:.3f})".format(**row)
        )
    write("steptime", options, rows)


@torch.no_grad()
def measured(model: Any, batch: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of blocks removed: `step` and `blocks` are what `of_blocks` says above."""
    blocks = len(model.model.layers)
    ids = torch.randint(0, 49152, (batch, options.prompt), generator=torch.Generator().manual_seed(options.seed))
    steps = {n: Step(keep_blocks(model, kept(blocks, n)), ids) for n in (0, *options.removed)}
    times: dict[int, list[tuple[float, float]]] = {n: [] for n in steps}
    for number in range(options.rounds + 3):
        order = list(steps) if number % 2 else list(steps)[::-1]
        for n in order:
            took = steps[n].run()
            if number >= 3:
                times[n].append(took)
    rows = []
    for n in options.removed:
        row: dict[str, Any] = {"batch": batch, "removed": n, "dense_ms": round(1e3 * median(t for t, _ in times[0]), 2)}
        for at, name in enumerate(("step", "blocks")):
            ratios = [d[at] / p[at] * (blocks - n) / blocks for d, p in zip(times[0], times[n], strict=True)]
            low, *_, high = quantiles(ratios, n=20)
            row[name] = {"median": median(ratios), "low": low, "high": high}
        rows.append(row)
    return rows


def kept(blocks: int, removed: int) -> tuple[int, ...]:
    """All but every fourth block from block 1 on, then from 2 on."""
    gone = [*range(1, blocks, 4), *range(2, blocks, 4)][:removed]
    return tuple(block for block in range(blocks) if block not in gone)


class Step:
    """One decode step of a model, again and again from the same prompt."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self._runner, self._kv = Blockwise(model), [LayerKV() for _ in model.model.layers]
        hidden, span = self._runner.embed(ids)
        for layer, kv in enumerate(self._kv):
            hidden = self._runner.block(layer, hidden, span, kv)
        self._token, self._at = ids[:, -1:], ids.shape[1]

    def run(self) -> tuple[float, float]:
        """Seconds of the step, and of its blocks."""
        began = time.perf_counter()
        hidden, span = self._runner.embed(self._token, self._at)
        entered = time.perf_counter()
        for layer, kv in enumerate(self._kv):
            hidden = self._runner.block(layer, hidden, span, kv.fork())
        left = time.perf_counter()
        self._runner.logits(hidden)
        return time.perf_counter() - began, left - entered


if __name__ == "__main__":
    main()
