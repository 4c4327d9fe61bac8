"""Launches of one chunk's pack and unpack, torch's form and Triton's -> results/launches.json. `make bench-launches`.

Counted on meta tensors: no GPU, nothing computed. A launch is each operation of torch that is no view, copies among
them, and each Triton kernel; a sync is each operation after which the host goes on only when the GPU is done: a value
read back, or a copy between host and device that is not asynchronous. Chunks are new: of one that was moved before the
Triton form has its table on the GPU already, a launch less.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from __results import write
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pdtrim_deploy.kvcache import torch_pack
from pdtrim_deploy.kvcache.gpu import move as gpu
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.kvcache.layout import ChunkLayout, chunk_layout
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.wire import WIRE_DTYPES

LLAMA = ModelShape(
    architecture="Llama-3.1-8B", fingerprint="shape", num_blocks=32, num_kv_heads=8, head_dim=128, kv_dtype="bfloat16"
)
DEVICE = torch.device("meta")
READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::equal"}


class Counted(TorchDispatchMode):
    """Launches and syncs while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if func.is_view or func._schema.name.startswith("aten::empty") or DEVICE.type not in devices:
            return result
        self.launches += 1
        waits = len(devices) > 1 and not (kwargs.get("non_blocking") or True in args)
        self.syncs += waits or func._schema.name in READS
        return result


def counted(move: Callable[[], object]) -> Counted:
    """What one call does. `torch.tensor` of numbers for a GPU copies them there and waits, which no operation shows."""
    with (
        Counted() as counter,
        patch.object(gpu, "launch") as launch,
        patch.object(torch, "tensor", wraps=torch.tensor) as new,
    ):
        move()
    counter.launches += launch.call_count
    counter.syncs += sum(call.kwargs.get("device") == DEVICE for call in new.call_args_list)
    return counter


def row(wire: str, plan: PDPlan, layout: ChunkLayout, offsets: KeyOffsets, triton: bool) -> dict[str, object]:
    """Figures of one form."""
    keys, values = ([torch.empty(1024, 8, 128, dtype=torch.bfloat16, device=DEVICE)] * 32 for _ in range(2))
    slots, packed = (
        torch.empty(n, dtype=t, device=DEVICE) for n, t in ((512, torch.int64), (layout.total_bytes, torch.uint8))
    )
    there = offsets.to(DEVICE)
    there.table(1024)
    if triton:
        gpu._fault(DEVICE)
        steps = [
            counted(lambda pack=pack: gpu.move(layout, packed, keys, values, slots, there, pack=pack))
            for pack in (True, False)
        ]
    else:
        steps = [
            counted(lambda: torch_pack.pack(layout, keys, values, slots, packed, there)),
            counted(lambda: torch_pack.unpack(layout, packed, keys, values, slots, there)),
        ]
    return {
        "wire": wire, "plan": plan_name(plan), "form": "triton" if triton else "torch",
        "pack_launches": steps[0].launches, "unpack_launches": steps[1].launches,
        "syncs": sum(step.syncs for step in steps),
    }  # fmt: skip


def plan_name(plan: PDPlan) -> str:
    """What of the layers travels."""
    cut = sum(send.mode == "sparse" for send in plan.kv)
    return f"{len(plan.kv) - cut} whole layers, {cut} cut to 4 + 64 rows" if cut else f"{len(plan.kv)} whole layers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    options = parser.parse_args()
    rows = []
    for whole in (32, 8):
        for wire in WIRE_DTYPES:
            cut = {"mode": "sparse", "n_first": 4, "n_last": 64}
            sends = tuple(KVSend(wire_dtype=wire, **(cut if layer >= whole else {})) for layer in range(32))
            means = {layer: torch.zeros(8, 128) for layer in range(32)}
            offsets = KeyOffsets.make(means, torch.ones(64), 1.0)
            plan = PDPlan.dense(LLAMA).with_kv(sends).with_key_offsets(offsets.file)
            for triton in (False, True):
                rows.append(row(wire, plan, chunk_layout(plan, 512), offsets, triton))
                print(*rows[-1].values(), flush=True)
    write("launches", options, rows)


if __name__ == "__main__":
    main()
