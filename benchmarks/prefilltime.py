"""How prefill's time falls with blocks that run for their K and V alone -> results/prefilltime.json.

`make bench-prefilltime`. The stage graph of SmolLM2-135M, dequantised from Q4_1, in onnxruntime, float32, one prompt in
one pass, attention the op's own body; no LM head. Engines of the dense stage and of those with n such blocks take
turns, round by round. Which blocks makes no difference: every third is one. `of_blocks` is dense over pruned, divided
by 30 / (30 - n): 1 is in proportion, and what is left to compute (a norm, K and V) keeps it below.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import torch
from __results import write
from pdtrim_builders.graph.build import build_graph
from pdtrim_builders.graph.stage import read_stage
from pdtrim_builders.runtime_onnx import OnnxStage

from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import DEFAULT_SOURCE, resolve
from pdtrim_deploy.models.checkpoint import Checkpoint
from pdtrim_deploy.models.surgery import write_stage
from pdtrim_deploy.plan import Keep, KVOnly, KVSend, PDPlan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alone", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    checkpoint = resolve(DEFAULT_SOURCE, Cache.default())
    ids = torch.randint(0, 49152, (options.prompt,), generator=torch.Generator().manual_seed(options.seed))
    at, threads = torch.arange(options.prompt), torch.get_num_threads()
    with tempfile.TemporaryDirectory() as work:
        engines = {n: OnnxStage(engine(checkpoint, n, Path(work)), threads=threads) for n in (0, *options.alone)}
        times: dict[int, list[float]] = {n: [] for n in engines}
        for number in range(options.rounds + 2):
            for n in list(engines) if number % 2 else list(engines)[::-1]:
                began = time.perf_counter()
                engines[n].run(ids, at)
                if number >= 2:
                    times[n].append(time.perf_counter() - began)
    rows, blocks = [], checkpoint.facts.num_blocks
    for n in options.alone:
        faster = [dense / pruned for dense, pruned in zip(times[0], times[n], strict=True)]
        row: dict[str, object] = {"alone": n, "dense_ms": round(1e3 * median(times[0]), 1)}
        for name, share in (("faster", 1.0), ("of_blocks", (blocks - n) / blocks)):
            low, *_, high = quantiles([ratio * share for ratio in faster], n=20)
            row[name] = {"median": median(faster) * share, "low": low, "high": high}
        rows.append(row)
        print(row)
    write("prefilltime", options, rows)


def engine(checkpoint: Checkpoint, alone: int, work: Path) -> Path:
    """A graph of prefill, so many blocks of which are there for K and V; nothing is fitted, which costs no time."""
    shape, blocks = checkpoint.shape("float32"), checkpoint.facts.num_blocks
    chosen = [*range(1, blocks, 3)][:alone]
    keep = (Keep(),) * blocks
    prefill = tuple(KVOnly() if block in chosen else Keep() for block in range(blocks))
    plan = PDPlan(model=shape, prefill=prefill, decode=keep, kv=(KVSend(),) * blocks)
    folder = work / str(alone) / "prefill"
    write_stage(checkpoint, folder, range(blocks), "float32", plan.model_dump(mode="json"))
    return build_graph(read_stage(folder), folder.parent / "model.onnx", "float32").path


if __name__ == "__main__":
    main()
