"""How fast KV is packed and unpacked, beside the machine's memcpy -> results/pack.json. `make bench-pack`.

A round times memcpy (torch `copy_` between two buffers as large as the native payload) and then each case once, so
that a busy machine slows all alike; a case's share of memcpy is taken within each round. GB/s and `of_memcpy` count
*native* bytes: what a quantised dtype moves of the pool in a second. `traffic_of_memcpy` counts all bytes read and
written, of which a quantised dtype has fewer than memcpy: what it makes of the memory's bandwidth.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from __results import write

from pdtrim_deploy.kvcache.layout import chunk_layout
from pdtrim_deploy.kvcache.pack import pack, unpack
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.wire import WIRE_DTYPES

SHAPES = {"SmolLM2-135M": (30, 3, 64), "Llama-3.1-8B, 6 of its 32 layers": (6, 8, 128)}  # layers, KV heads, head size


def slots_of(kind: str, pool: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Pool slots of a prompt: one run, pages in random order, or tokens in random order."""
    page = {"one run": pool, "pages of 64": 64, "pages of 16": 16, "pages of 1": 1}[kind]
    order = torch.randperm(pool // page, generator=generator)
    return (order[:, None] * page + torch.arange(page)).flatten()[:tokens]


Timed = dict[tuple[str, str], Callable[[], object]]


def cases(shape: str, kind: str, tokens: int, seed: int) -> tuple[int, dict[str, int], Timed]:
    """Native bytes of the prompt, packed bytes by wire dtype, and what to time by (wire dtype, step)."""
    layers, heads, head_dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    pools = torch.randn(2, layers, 2 * tokens, heads, head_dim, generator=generator).bfloat16()
    keys, values = (list(side) for side in pools)
    slots = slots_of(kind, 2 * tokens, tokens, generator)
    model = ModelShape(
        architecture=shape,
        fingerprint="random",
        num_blocks=layers,
        num_kv_heads=heads,
        head_dim=head_dim,
        kv_dtype="bfloat16",
    )
    dense, timed = PDPlan.dense(model), Timed()
    source, target = (torch.zeros(dense.payload_bytes(tokens), dtype=torch.uint8) for _ in range(2))
    timed["memcpy", "copy"] = lambda: target.copy_(source)
    packed = {"memcpy": len(source)}
    for wire in WIRE_DTYPES:
        layout = chunk_layout(dense.model_copy(update={"kv": (KVSend(wire_dtype=wire),) * layers}), tokens)
        staging = torch.zeros(layout.total_bytes, dtype=torch.uint8)
        packed[wire] = layout.total_bytes
        timed[wire, "pack"] = lambda layout=layout, staging=staging: pack(layout, keys, values, slots, staging)
        timed[wire, "unpack"] = lambda layout=layout, staging=staging: unpack(layout, staging, keys, values, slots)
    return len(source), packed, timed


def measure(shape: str, kind: str, tokens: int, rounds: int, seed: int) -> list[dict[str, object]]:
    """One row a wire dtype and step."""
    size, packed, timed = cases(shape, kind, tokens, seed)
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in timed}
    for run in timed.values():
        run()
    for _ in range(rounds):
        for name, run in timed.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    memcpy, rows = seconds["memcpy", "copy"], []
    for (wire, step), took in seconds.items():
        speeds = [size / duration / 1e9 for duration in took]
        shares = [reference / duration for reference, duration in zip(memcpy, took, strict=True)]
        traffic = (size + packed[wire]) / (2 * size)
        rows.append(
            {
                "shape": shape,
                "slots": kind,
                "wire_dtype": wire,
                "step": step,
                "native_bytes": size,
                "gb_per_s": {"median": statistics.median(speeds), "least": min(speeds), "most": max(speeds)},
                "of_memcpy": {"median": statistics.median(shares), "least": min(shares), "most": max(shares)},
                "traffic_of_memcpy": traffic * statistics.median(shares),
            }
        )
        print(f"{shape:34s} {kind:12s} {wire:7s} {step:7s}", end="")
        print(f"{statistics.median(speeds):7.2f} GB/s {statistics.median(shares):6.2f} of memcpy", end="")
        print(f" ({min(shares):.2f} .. {max(shares):.2f})", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        row
        for shape in SHAPES
        for kind in ("one run", "pages of 64", "pages of 16", "pages of 1")
        for row in measure(shape, kind, options.tokens, options.rounds, options.seed)
    ]
    write("pack", options, rows)


if __name__ == "__main__":
    main()
