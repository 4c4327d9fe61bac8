"""Hooks around radix caches: decode's may keep rows that prefill has sent, and never rows that decode computed.

SGLang inserts a request's prompt when its transfer is complete, and prompt and answer when it ends. Under a plan the
answer's rows come from another model than prefill's, or have not been quantised, so the next turn's prefill would send
other ones. The prompt's rows depend on the tokens before them alone: they are what prefill would send again.

Where a plan has a tail, prefill's rows of the last prompt tokens depend on where the prompt ends: they are neither kept
in the cache nor taken from it. Prefill's may exchange a request's pages when it inserts them: rows that leave layer by
layer are read before or after.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from pdtrim_sglang.patches.transfer import prompt_tokens


def keep_received_rows_only(manager: Any, queue: Any) -> Any:
    """Called when a decode worker has its KV manager.

    Raises:
        RuntimeError: its prefix cache is another one than SGLang's own, and would not ask `insert_rows`.

    """
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    tree = queue.tree_cache
    if not getattr(manager, "serves_plan", False) or tree.disable:
        return manager
    if type(tree) is not UnifiedRadixCache:
        raise RuntimeError(
            f"pdtrim: {type(tree).__name__} would also keep rows that decode has computed, which are not prefill's: "
            "start decode with SGLang's own radix cache, without --radix-cache-backend, --enable-lmcache and "
            "--enable-flexkv, or without --disaggregation-decode-enable-radix-cache"
        )
    tree.pdtrim_received_only = True
    return manager


def reusable_tokens(original: Callable[..., int], req: Any, input_len: int) -> int:
    """How many tokens of a prompt its prefix may come from the cache: on prefill none of the plan's tail."""
    return max(0, min(original(req, input_len), input_len - _tail(req)))


def insert_rows(original: Callable[..., None], tree: Any, req: Any, *, up_to: int, **others: Any) -> None:
    """Insert the request's first `up_to` tokens: on decode no generated ones, on prefill none of the plan's tail."""
    if getattr(tree, "pdtrim_received_only", False):
        up_to = min(up_to, prompt_tokens(req))
    if tail := _tail(req):
        up_to = max(0, min(up_to, prompt_tokens(req) - tail))
    moving = getattr(tree, "pdtrim_moving", None)
    with nullcontext() if moving is None else moving(req):
        original(tree, req, up_to=up_to, **others)


def _tail(req: Any) -> int:
    """Last tokens of the prompt that prefill computes for their place; of a request without our sender none are."""
    return int(getattr(getattr(req, "disagg_kv_sender", None), "prompt_tail", 0))
