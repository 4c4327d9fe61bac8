"""What sending each layer as it is computed would save in TTFT -> results/overlap.json. `make bench-overlap`.

Today a chunk of a prompt travels while the next one is computed; its rows leave when all of its layers are there. Here
bytes go over the relay on loopback (`serve --link`) both ways: a chunk's at the end of its forward pass, and each
layer's at the end of that layer. The model's compute is a stand-in: a wait of 2 x weights x tokens floating-point
operations at `--mfu` of an H100's 989 TFLOP/s (bfloat16, dense), the same for each layer. Bytes and the link's speed
are divided by `--shrink`, which leaves all times as they are, because the relay itself carries 1 Gb/s at most.

What packing and scattering cost, and what more and smaller messages would, is left out: savings are upper bounds.
`expected` is what the same schedule comes to by arithmetic.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import threading
import time
from dataclasses import dataclass
from statistics import median

from __results import write

from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.link import Link
from pdtrim_deploy.serving.ports import HOST, free_ports
from pdtrim_deploy.serving.relay import Throttle

PEAK = 989e12  # FLOP/s of an H100 SXM in bfloat16, without sparsity


@dataclass(frozen=True)
class Model:
    """`parameters` in the blocks and the head; `gpus` compute a prefill worker's share, over one link."""

    name: str
    parameters: float
    layers: int
    gpus: int

    @property
    def plan(self) -> PDPlan:
        """All rows of all layers."""
        sizes = {"num_blocks": self.layers, "num_kv_heads": 8, "head_dim": 128, "kv_dtype": "bfloat16"}
        return PDPlan.dense(ModelShape.model_validate({"architecture": "LlamaForCausalLM", "fingerprint": "-"} | sizes))


MODELS = (Model("Llama 3.1 8B, one GPU", 8.0e9, 32, 1), Model("Llama 3.1 70B, four GPUs", 70.6e9, 80, 4))
WIRES = ("native", "k4v3")


def schedule(steps: list[tuple[float, int]], bytes_per_s: float) -> float:
    """When the last byte is there: each step's bytes are ready at its time, and leave in order."""
    free = 0.0
    for ready, size in steps:
        free = max(free, ready) + size / bytes_per_s
    return free


def drive(steps: list[tuple[float, int]], bytes_per_s: float) -> float:
    """The same over the relay, in seconds of the clock."""
    total = sum(size for _, size in steps)
    with socket.create_server((HOST, 0)) as server, contextlib.ExitStack() as stack:
        (port,) = free_ports(1)
        stack.enter_context(contextlib.closing(Throttle(port, server.getsockname()[1], bytes_per_s)))
        arrived: list[float] = []

        def receive() -> None:
            connection, _ = server.accept()
            with connection:
                left = total
                while left and (data := connection.recv(1 << 20)):
                    left -= len(data)
            arrived.append(time.monotonic())

        thread = threading.Thread(target=receive)
        thread.start()
        with socket.create_connection((HOST, port)) as sender:
            begun = time.monotonic()
            for ready, size in steps:
                time.sleep(max(0.0, begun + ready - time.monotonic()))
                sender.sendall(bytes(size))
            thread.join()
    return arrived[0] - begun


def steps_of(sizes: list[int], forward_s: float, chunks: int, by_layer: bool) -> list[tuple[float, int]]:
    """When the rows of each layer, or of each chunk, are there, and how many bytes they are."""
    if not by_layer:
        return [((number + 1) * forward_s, sum(sizes)) for number in range(chunks)]
    each = forward_s / len(sizes)
    return [(number * forward_s + (at + 1) * each, size) for number in range(chunks) for at, size in enumerate(sizes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", nargs="+", default=["0.1Gbps", "1Gbps", "10Gbps", "25Gbps"])
    parser.add_argument("--chunks", type=int, nargs="+", default=[2048, 8192], help="tokens")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4], help="chunks a prompt")
    parser.add_argument("--mfu", type=float, default=0.5, help="share of the GPU's peak that a forward pass reaches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shrink", type=int, default=256)
    parser.add_argument("--driven-s", type=float, default=2.5, help="longer schedules are expected only, not driven")
    options = parser.parse_args()
    rows = []
    for model in MODELS:
        for wire in WIRES:
            plan = model.plan.with_kv((KVSend(wire_dtype=wire),) * model.layers)
            for tokens in options.chunks:
                forward_s = 2 * model.parameters * tokens / (PEAK * options.mfu * model.gpus)
                sizes = [plan.layer_bytes(layer, tokens) // options.shrink for layer in range(model.layers)]
                for link in options.links:
                    for count in options.counts:
                        speed = Link.parse(link).bytes_per_s / options.shrink
                        ways = [steps_of(sizes, forward_s, count, by_layer) for by_layer in (False, True)]
                        expected = [schedule(steps, speed) for steps in ways]
                        rounds = options.rounds if expected[0] < options.driven_s else 0  # each has both ways
                        driven = [[drive(steps, speed) for steps in ways] for _ in range(rounds)]
                        chunk, layer = map(median, zip(*driven, strict=True)) if driven else expected
                        savings = [1 - by_layer / by_chunk for by_chunk, by_layer in driven or [expected]]
                        row = {
                            "model": model.name, "wire": wire, "chunk_tokens": tokens, "chunks": count, "link": link,
                            "forward_ms": round(1e3 * forward_s, 1), "chunk_bytes": options.shrink * sum(sizes),
                            "by_chunk_s": round(chunk, 4), "by_layer_s": round(layer, 4), "driven": bool(driven),
                            "expected_saving": 1 - expected[1] / expected[0], "saving": 1 - layer / chunk,
                            "least": min(savings), "most": max(savings),
                        }  # fmt: skip
                        rows.append(row)
                        print(row, flush=True)
    print(write("overlap", options, rows))


if __name__ == "__main__":
    main()
