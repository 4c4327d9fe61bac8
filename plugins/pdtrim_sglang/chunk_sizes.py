"""How many prompt tokens fit a staging slot, whatever their place in the prompt. Pure: no torch."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache

from pdtrim_deploy.plan import KVSend, PDPlan

MOST_TOKENS = 1 << 20  # of a chunk of a plan that cuts all layers: its bytes stop growing


def most_bytes(plan: PDPlan, tokens: int, kv_heads: int) -> int:
    """Packed bytes of a chunk of at most `tokens` tokens of any prompt, of a rank that holds `kv_heads` KV heads.

    The whole prompt of that many tokens has the most rows in each layer, and position 0, whose row may travel native.
    Only where the last rows of a layer no longer reach position 0 has a longer prompt fewer bytes than a shorter one.
    Of a layer that keeps a share of the prompt all rows of a chunk travel when the prompt is long enough.
    """
    plan = _of_long_prompts(plan)
    windows = {send.n_first + send.n_last for send in plan.kv if send.mode != "full"}
    prompts = {tokens} | {window for window in windows if window < tokens}
    return max(map(plan.kv_bytes, prompts)) * kv_heads // plan.model.num_kv_heads


@lru_cache
def _of_long_prompts(plan: PDPlan) -> PDPlan:
    """The plan with layers whole that keep a share of the prompt."""
    if not any(send.share for send in plan.kv):
        return plan
    return plan.with_kv(tuple(KVSend(wire_dtype=send.wire_dtype) if send.share else send for send in plan.kv))


@lru_cache
def most_tokens(plan: PDPlan, page_size: int, kv_heads: int, slot_bytes: int, beside: int = 0) -> int:
    """Tokens of the longest chunk of whole pages that fits `slot_bytes` wherever it lies; 0 when no page does.

    `beside` are the bytes that each token has besides the plan's.
    """

    def packed_bytes(pages: int) -> int:
        return most_bytes(plan, pages * page_size, kv_heads) + pages * page_size * beside

    return page_size * bisect_right(range(1, MOST_TOKENS // page_size + 1), slot_bytes, key=packed_bytes)
