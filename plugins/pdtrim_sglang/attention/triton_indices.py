"""Slots that each request of a decode batch attends to in layers of one window, listed by a Triton kernel.

The host waits for nothing and decides nothing: a CUDA graph may replay the kernel, and what depends on its lists.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pdtrim_sglang.attention.windows import Window

BLOCK_TOKENS = 256


def list_slots(
    req_to_token: Tensor,
    rows: Tensor,
    hidden: Tensor,
    indptr: Tensor,
    indices: Tensor,
    window: Window,
    slot_map: Tensor | None = None,
) -> None:
    """Write `indices[indptr[i] : indptr[i + 1]]` of each request `i`, in token order; what would not fit is left out.

    Args:
        req_to_token: int32 `[pool_rows, max_context]`, slot of each token.
        rows: int `[batch]`, row of each request.
        hidden: int `[batch]`, tokens that it does not see (`windows.hidden_tokens`).
        indptr: int32 `[batch + 1]`.
        indices: int64, any length; written in place.
        slot_map: int64, SGLang's slot -> one of the layers' own, when they have some.

    """
    list_slots_of_requests[(len(rows),)](
        req_to_token,
        req_to_token.stride(0),
        rows,
        hidden,
        indptr,
        indices,
        indices if slot_map is None else slot_map,
        window.n_first,
        len(indices),
        MAPPED=slot_map is not None,
        BLOCK=BLOCK_TOKENS,
    )


@triton.jit
def list_slots_of_requests(  # type: ignore[no-untyped-def]
    req_to_token,
    row_stride,
    rows,
    hidden,
    indptr,
    indices,
    slot_map,
    n_first,
    room,
    MAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a request."""
    request = tl.program_id(0)
    row = req_to_token + tl.load(rows + request).to(tl.int64) * row_stride
    unseen = tl.load(hidden + request)
    start = tl.load(indptr + request)
    length = tl.load(indptr + request + 1) - start
    for block in range(tl.cdiv(length, BLOCK)):
        column = block * BLOCK + tl.arange(0, BLOCK)
        inside = (column < length) & (start + column < room)
        token = column + tl.where(column >= n_first, unseen, 0)
        slot = tl.load(row + token, mask=inside, other=0).to(tl.int64)
        if MAPPED:
            slot = tl.load(slot_map + slot, mask=inside, other=0)
        tl.store(indices + start + column, slot, mask=inside)
