"""Launches of one served chunk's pack and unpack, torch's form and Triton's -> results/launches.json.

`make bench-launches`. Counted on meta tensors: no GPU, nothing computed. What a worker does is counted, all of it: on
prefill `Packer.pack`, which brings the chunk's slots to the GPU, packs there, and copies to a slot on the host; on
decode `DecodeRoom.take`, of a payload that lies on the host. A launch is each Triton kernel, and each operation of
torch on the GPU that is no view; a copy is one between host and GPU, which its copy engine does; a sync is each
operation after which the host goes on only when the GPU is done: a value read back, or a copy between host and device
that is not asynchronous. The wait at a chunk's end, of `take` for its stream and of the sender for its event, is not
among them. Chunks are new: of one that was moved before the Triton form has its table on the GPU already, a copy less.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from __results import write
from pdtrim_sglang.packing import Chunk, Packer
from pdtrim_sglang.pool import Destinations, PoolView
from pdtrim_sglang.protocol import ChunkHeader
from pdtrim_sglang.rooms import AuxRows, DecodeRoom
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pdtrim_deploy.kvcache import pack as forms
from pdtrim_deploy.kvcache.gpu import move as gpu
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.plan import KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.wire import WIRE_DTYPES

LLAMA = ModelShape(
    architecture="Llama-3.1-8B", fingerprint="shape", num_blocks=32, num_kv_heads=8, head_dim=128, kv_dtype="bfloat16"
)
DEVICE = torch.device("meta")
READS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::equal"}
TOKENS, PAGE = 512, 64
AUX = AuxRows((), ())


class Counted(TorchDispatchMode):
    """Launches, copies and syncs while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.copies = self.syncs = 0
        self.kernels: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        copies = func is torch.ops.aten.copy_.default  # out of meta there is nothing to copy
        result = args[0] if copies else func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if func.is_view or func._schema.name.startswith("aten::empty") or DEVICE.type not in devices:
            return result
        between = len(devices) > 1
        self.launches += not between
        self.copies += between
        waits = between and not (kwargs.get("non_blocking") or any(value is True for value in args))
        self.syncs += waits or func._schema.name in READS
        return result


def counted(move: Callable[[], object]) -> Counted:
    """What one call does. `torch.tensor` of numbers for a GPU copies them there and waits, which no operation shows."""
    with (
        Counted() as counter,
        patch.object(gpu, "launch") as launch,
        patch.object(torch, "tensor", wraps=torch.tensor) as new,
        patch.object(torch, "as_tensor", wraps=torch.as_tensor) as converted,
    ):
        move()
    numbers = [*new.call_args_list, *converted.call_args_list]
    counter.kernels = [call.args[0] for call in launch.call_args_list]
    counter.launches += len(counter.kernels)
    uploads = sum(call.kwargs.get("device") == DEVICE for call in numbers)
    counter.copies += uploads
    counter.syncs += uploads
    return counter


@contextmanager
def on_meta(triton: bool) -> Iterator[None]:
    """Workers whose pools are meta tensors: no stream is there to wait for. One of the two forms moves rows."""
    move = gpu.move if triton else lambda *_, **__: False
    with (
        patch.object(forms, "_move", move),
        patch.object(forms, "check"),
        patch.multiple(PoolView, wait=lambda pool: None, record_event=lambda pool: None, after=lambda pool, *_: None),
    ):
        yield


def moves(plan: PDPlan, offsets: KeyOffsets, room: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A chunk's pack on prefill, and its unpack on decode, where the layers of each rule have slots of their own."""
    there = offsets.to(DEVICE)
    there.table(1024)
    keys, values = ([torch.empty(1024, 8, 128, dtype=torch.bfloat16, device=DEVICE)] * 32 for _ in range(2))
    pool = PoolView(keys, values, PAGE, offsets=there)
    on_host = torch.empty(plan.payload_bytes(TOKENS), dtype=torch.uint8)
    packer = Packer(plan, pool, AUX, [on_host])
    chunk = Chunk(room, torch.arange(TOKENS // PAGE).int(), 0, TOKENS, 0, TOKENS, True, 0)
    rules = list(dict.fromkeys(send for send in plan.kv if send.mode == "sparse"))
    groups = tuple(rules.index(send) + 1 if send in rules else 0 for send in plan.kv)
    slots = torch.empty(1 + len(rules), TOKENS, dtype=torch.int64, device=DEVICE)
    entry = DecodeRoom(room, TOKENS, 0, Destinations(slots, groups), 0, senders={0: pool.heads})
    header = ChunkHeader(
        digest=bytes(32), room=room, rank=0, prompt_tokens=TOKENS, start=0, stop=TOKENS, aux_bytes=0,
        payload_bytes=len(on_host), last=True, heads=pool.heads,
    )  # fmt: skip

    def take() -> None:
        reason = entry.take(plan, pool, AUX, header, on_host, memoryview(b""))
        assert not reason, reason

    return lambda: packer.pack(0.0, chunk, 0), take


def row(wire: str, plan: PDPlan, offsets: KeyOffsets, triton: bool) -> dict[str, object]:
    """Figures of one form."""
    gpu._fault(DEVICE)
    with on_meta(triton):
        steps = [counted(move) for move in moves(plan, offsets, 1)]
    return {
        "wire": wire, "plan": plan_name(plan), "form": "triton" if triton else "torch",
        "pack_launches": steps[0].launches, "unpack_launches": steps[1].launches,
        "pack_copies": steps[0].copies, "unpack_copies": steps[1].copies, "syncs": sum(step.syncs for step in steps),
    }  # fmt: skip


def plan_name(plan: PDPlan) -> str:
    """What of the layers travels."""
    cut = [send for send in plan.kv if send.mode == "sparse"]
    whole = f"{len(plan.kv) - len(cut)} whole layers"
    return f"{whole}, {len(cut)} cut by {len(set(cut))} rules" if cut else whole


def plan_of(wire: str, whole: int) -> tuple[PDPlan, KeyOffsets]:
    """Layers from `whole` on are cut by three rules in turn; keys travel less offsets."""
    ends = [{"mode": "sparse", "n_first": 4, "n_last": last} for last in (64, 128, 192)]
    sends = tuple(KVSend(wire_dtype=wire, **(ends[layer % 3] if layer >= whole else {})) for layer in range(32))
    offsets = KeyOffsets.make({layer: torch.zeros(8, 128) for layer in range(32)}, torch.ones(64), 1.0)
    return PDPlan.dense(LLAMA).with_kv(sends).with_key_offsets(offsets.file), offsets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    options = parser.parse_args()
    rows = []
    for whole in (32, 8):
        for wire in WIRE_DTYPES:
            plan, offsets = plan_of(wire, whole)
            for triton in (False, True):
                rows.append(row(wire, plan, offsets, triton))
                print(*rows[-1].values(), flush=True)
    write("launches", options, rows)


if __name__ == "__main__":
    main()
