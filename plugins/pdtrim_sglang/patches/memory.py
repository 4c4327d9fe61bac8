"""Hooks around a decode worker's memory: sparse layers may have pools of their own, and keep prompt lengths."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from pdtrim_sglang.patches.transfer import prompt_tokens


def note_prompt_length(original: Callable[..., Any], queue: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    prompt, allocator = prompt_tokens(req), queue.token_to_kv_pool_allocator
    with getattr(allocator, "prompt", contextlib.nullcontext)(prompt):
        allocated = original(queue, req, *args, **kwargs)
    lengths = getattr(queue.req_to_token_pool, "pdtrim_prompt_tokens", None)
    if lengths is not None:
        lengths[req.kv.req_pool_idx] = prompt
    return allocated


def ask_sparse_layers(original: Callable[..., int], queue: Any, req: Any, *args: Any, **kwargs: Any) -> int:
    """What admission must find free in the full layers: more than there is while the sparse ones have no room.

    No more than the pool has: SGLang wants 512 tokens beside the prompt, and a longer prompt would wait for ever.
    """
    allocator = queue.token_to_kv_pool_allocator
    tokens = min(original(queue, req, *args, **kwargs), allocator.size)
    if not hasattr(allocator, "prompt"):
        return tokens
    from pdtrim_sglang.split_pool.admission import has_room

    room = has_room(queue, req, prompt_tokens(req))
    return tokens if room else allocator.size + allocator.page_size + 1


def split_pool(original: Callable[..., Any], configurator: Any, *, mha_pool_class: Any, **given: Any) -> Any:
    from pdtrim_sglang.split_pool.build import pool_class

    return original(configurator, mha_pool_class=pool_class(configurator, mha_pool_class, **given), **given)


def split_allocator(original: Callable[..., Any], configurator: Any, *, token_to_kv_pool: Any, **given: Any) -> Any:
    from pdtrim_sglang.split_pool.allocator import split_allocator
    from pdtrim_sglang.split_pool.pool import SplitKVPool

    made = original(configurator, token_to_kv_pool=token_to_kv_pool, **given)
    return split_allocator(made) if isinstance(token_to_kv_pool, SplitKVPool) else made


def split_cell_size(original: Callable[..., int], sizer: Any, configurator: Any, *args: Any, **kwargs: Any) -> int:
    from pdtrim_sglang.split_pool.build import token_bytes

    return token_bytes(configurator, original(sizer, configurator, *args, **kwargs))
