"""Ranks that each have rows to send, and staging buffers that hold a page of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pdtrim_deploy.plan import PDPlan
from pdtrim_sglang.chunk_sizes import most_bytes

if TYPE_CHECKING:
    from pdtrim_sglang.pool import PoolView


def check_draft_ranks(plan: PDPlan, ranks: int) -> None:
    """Raise RuntimeError where ranks hold copies of KV heads: one sends them for all, and not each its draft rows."""
    if ranks > (heads := plan.model.num_kv_heads):
        raise RuntimeError(
            f"pdtrim: a draft model's KV is sent from as many ranks as the model has KV heads at most, {heads}: start "
            f"with --tp-size {heads}, or without --speculative-algorithm"
        )


def check_staging(plan: PDPlan, pool: PoolView, staging_bytes: int) -> None:
    """Raise RuntimeError when a page, or a layer's state, the least that is sent, does not fit the staging buffer."""
    page = most_bytes(plan, pool.page_size, pool.kv_heads) + pool.draft_bytes(0, pool.page_size)
    if page > staging_bytes:
        raise RuntimeError(
            f"pdtrim: staging_bytes {staging_bytes} hold no page of {pool.page_size} tokens of this model: give "
            f"{page} at least, to all workers, or start them with a smaller --page-size"
        )
    if pool.states is not None and pool.states.layer_bytes > staging_bytes:
        raise RuntimeError(
            f"pdtrim: staging_bytes {staging_bytes} hold no layer's state of this model: give "
            f"{pool.states.layer_bytes} at least, to all workers"
        )
