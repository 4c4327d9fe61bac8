"""Move KV between a paged pool and the packed bytes of a `ChunkLayout`, through the codecs of its wire dtypes.

One meaning, several forms with the same bytes. `table` says of a chunk what moves from where to where; on a CPU a
compiled library (`cpu/`) executes it in one pass over memory, on a GPU one Triton launch (`gpu/`) does. torch's own
operations (`torch_pack`) are what tests hold both to, and stand in where there is no compiler, or no Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_deploy.kvcache import torch_pack
from pdtrim_deploy.kvcache.checksum import checksum
from pdtrim_deploy.kvcache.cpu import library as cpu
from pdtrim_deploy.kvcache.cpu import move as cpu_move
from pdtrim_deploy.kvcache.gpu import library as gpu
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.kvcache.layout import ChunkLayout, chunk_layout
from pdtrim_deploy.kvcache.table import Groups
from pdtrim_deploy.plan import PDPlan


def pack(
    layout: ChunkLayout,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    out: Tensor | None = None,
    offsets: KeyOffsets | None = None,
    groups: Groups | None = None,
) -> Tensor:
    """Gather, quantise and pack a chunk's rows from the prefill pool.

    Args:
        keys, values: one pool tensor per *prefill* layer, `[pool_slots, kv_heads, head_dim]`, native dtype; for a
            range of the pool's heads views of it (`pool[:, first:stop]`), with a layout and offsets of those heads.
        slots: int64 `[stop - start]`, the pool slot of each token of the chunk; `[groups, stop - start]` where layers
            have slots of their own, and `groups` says of each layer of the pool which row they are.
        out: uint8 staging buffer of at least `layout.total_bytes`, aligned to 4 bytes, on the pool's device or the
            host; made on the pool's device when left out.
        offsets: the plan's key offsets, of the pool's KV heads; None when the plan has none.

    Returns:
        uint8 `[layout.total_bytes]`, a view of `out` when it was given. In host memory the bytes are there; on a GPU
        they are when the current stream has come so far.

    Raises:
        IndexError: a slot lies outside its pool. On a GPU whose bytes stay there, `check` raises it.
        ValueError: a layer's keys travel less an offset, and `offsets` has none.

    """
    offsets = None if offsets is None else offsets.to(slots.device)
    if out is None:
        out = torch.empty(layout.total_bytes, dtype=torch.uint8, device=slots.device)
    out = out[: layout.total_bytes]
    if out.device != slots.device:
        out.copy_(pack(layout, keys, values, slots, offsets=offsets, groups=groups))
        check(slots.device)
    elif not _move(layout, out, keys, values, slots, offsets, groups, pack=True):
        torch_pack.pack(layout, keys, values, slots, out, offsets, groups)
    return out


def unpack(
    layout: ChunkLayout,
    packed: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    offsets: KeyOffsets | None = None,
    groups: Groups | None = None,
) -> None:
    """Scatter packed bytes into the decode pool; rows that were not sent are left untouched.

    Args:
        packed: uint8, `layout.total_bytes` long, as `pack` made it, aligned to 4 bytes; in host memory or on the
            pool's device, whose current stream then writes the rows. Pinned memory is read by that stream: keep it
            until then.
        keys, values: one pool tensor per *decode* layer, `[pool_slots, kv_heads, head_dim]`, or views as of `pack`.
        slots, groups: as of `pack`, by *decode* layer.
        offsets: as of `pack`.

    Raises:
        IndexError: a slot lies outside its pool. On a GPU `check` raises it.
        ValueError: a layer's keys travel less an offset, and `offsets` has none.

    """
    offsets = None if offsets is None else offsets.to(slots.device)
    packed = packed.to(slots.device, non_blocking=True)
    if not _move(layout, packed, keys, values, slots, offsets, groups, pack=False):
        torch_pack.unpack(layout, packed, keys, values, slots, offsets, groups)


def check(device: torch.device) -> None:
    """Call it in the thread that queued a chunk, when its event has come. It waits for nothing and copies nothing.

    Raises:
        IndexError: a slot lay outside its pool, of a chunk that this thread has queued on this GPU since the last call;
            its rows were neither read nor written, and packed as zeros. Where another thread is to wait for the
            chunk, give it a flag of its own (`gpu.faults`).

    """
    if device.type == "cuda" and (form := gpu.library()) is not None:
        form.check(device)


def prepare(
    plan: PDPlan | None = None,
    pool: Tensor | None = None,
    offsets: KeyOffsets | None = None,
    values: Tensor | None = None,
) -> None:
    """Compile and load now what the first `pack` would wait for: seconds, once a machine.

    On a GPU kernels are compiled for a plan and for pools like `pool`, `[pool_slots, kv_heads, head_dim]`, which is not
    touched, and of V like `values`, where they differ; on a CPU none is needed.
    """
    if plan is None or pool is None or pool.is_cpu:
        cpu.library()
        return
    tokens, middle = _prompt_with_a_middle(plan)
    layers = len(plan.prefill_kv_blocks)
    of_k, of_v = ([torch.zeros_like(like[:1])] * layers for like in (pool, pool if values is None else values))
    slots = torch.zeros(tokens, dtype=torch.int64, device=pool.device)
    for start, stop in ((0, tokens), (middle, middle + 1)):  # in a prompt's middle whole layers travel alone
        layout = chunk_layout(plan, tokens, start, stop, pool.shape[1])
        packed = pack(layout, of_k, of_v, slots[start:stop], offsets=offsets)
        checksum(packed)  # of slots in a GPU's memory
        unpack(layout, packed, of_k, of_v, slots[start:stop], offsets)


def _prompt_with_a_middle(plan: PDPlan) -> tuple[int, int]:
    """Tokens of a short prompt, and a position of it that stays behind in every cut layer."""
    cut = [send for send in plan.kv if send.mode != "full"]
    tokens = 3
    while True:
        first, last = (max((send.edges(tokens)[side] for send in cut), default=0) for side in (0, 1))
        if first + 1 < tokens - last:
            return tokens, first + 1
        tokens *= 2


def _move(
    layout: ChunkLayout,
    packed: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    slots: Tensor,
    offsets: KeyOffsets | None,
    groups: Groups | None,
    *,
    pack: bool,
) -> bool:
    """The compiled form of the pools' device; False where there is none, or it cannot."""
    if slots.device.type != "cuda":
        return cpu_move.move(layout, packed, keys, values, slots, offsets, groups, pack=pack)
    form = gpu.library()
    return form is not None and form.move(layout, packed, keys, values, slots, offsets, groups, pack=pack)
