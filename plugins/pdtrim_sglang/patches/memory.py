"""Hooks around a decode worker's memory: cut layers have pools of their own, which follow SGLang's requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pdtrim_sglang.patches.transfer import prompt_tokens


def choose_kv_dtype(original: Callable[..., Any], runner: Any) -> Any:
    from sglang.srt.mem_cache import kv_cache_dtype
    from sglang.srt.utils.common import cpu_has_amx_support

    from pdtrim_sglang.cpu.fp8_pools import as_on_gpus

    if cpu_has_amx_support():  # there SGLang has pools and kernels of its own
        return original(runner)
    with as_on_gpus(kv_cache_dtype):
        return original(runner)


def configure_pool(original: Callable[..., Any], configurator: Any, **arguments: Any) -> Any:
    from sglang.srt.mem_cache import kv_cache_configurator
    from sglang.srt.utils.common import cpu_has_amx_support

    from pdtrim_sglang.cpu.fp8_pools import FP8, as_on_gpus

    if cpu_has_amx_support() or configurator.use_mla_backend or configurator.kv_cache_dtype not in FP8:
        return original(configurator, **arguments)
    with as_on_gpus(kv_cache_configurator):
        return original(configurator, **arguments)


def kept_pool(original: Callable[..., Any], configurator: Any, *, mha_pool_class: Any, **arguments: Any) -> Any:
    from pdtrim_sglang.kept_pool.build import pool_class

    return original(configurator, mha_pool_class=pool_class(configurator, mha_pool_class, **arguments), **arguments)


def kept_cell_size(original: Callable[..., int], sizer: Any, configurator: Any, *args: Any, **kwargs: Any) -> int:
    from pdtrim_sglang.kept_pool.build import token_bytes

    return token_bytes(configurator, original(sizer, configurator, *args, **kwargs))


def pool_beside_tables(
    original: Callable[..., Any], configurator: Any, budget_bytes: int, *args: Any, **others: Any
) -> Any:
    """The sizes of what is left of a budget when cut layers have their tables, which no larger pool needs less of."""
    from pdtrim_sglang.kept_pool.tables import table_bytes

    config = original(configurator, budget_bytes, *args, **others)
    taken = table_bytes(configurator, config.max_total_num_tokens)
    return original(configurator, max(0, budget_bytes - taken), *args, **others) if taken else config


def bind_tables(allocator: Any, configurator: Any, *, req_to_token_pool: Any, **_: Any) -> None:
    """The tables have a row for each of SGLang's, whose pool of requests tells them what becomes of it."""
    kept = _kept(allocator)
    if kept is not None:
        kept.bind(*req_to_token_pool.req_to_token.shape)
        req_to_token_pool.pdtrim_kept = kept


def _kept(allocator: Any) -> Any:
    return getattr(allocator.get_kvcache(), "kept", None)


def admit(original: Callable[..., Any], queue: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    allocated = original(queue, req, *args, **kwargs)
    if (kept := _kept(queue.token_to_kv_pool_allocator)) is not None:
        kept.admit(req.kv.req_pool_idx, prompt_tokens(req), req.kv.kv_committed_len)
    return allocated


def extend(
    original: Callable[..., None], pool: Any, *, req_pool_indices_cpu: Any, target_seq_lens_cpu: Any, **others: Any
) -> None:
    """In each decode step, for what SGLang calls the auxiliary tables of its requests."""
    original(pool, req_pool_indices_cpu=req_pool_indices_cpu, target_seq_lens_cpu=target_seq_lens_cpu, **others)
    if (kept := getattr(pool, "pdtrim_kept", None)) is not None:
        kept.extend(req_pool_indices_cpu, target_seq_lens_cpu)


def release(original: Callable[..., None], pool: Any, req: Any) -> None:
    row = req.kv.req_pool_idx
    original(pool, req)
    if (kept := getattr(pool, "pdtrim_kept", None)) is not None:
        kept.release(row)


def clear(_: None, pool: Any) -> None:
    if (kept := getattr(pool, "pdtrim_kept", None)) is not None:
        kept.clear()


def ask_cut_layers(
    original: Callable[..., int], queue: Any, req: Any, allocated_tokens: int, prefix_tokens: int, *others: Any
) -> int:
    """What admission must find free in the whole layers: more than there is while the cut ones have no room.

    No more than the pool has beside the `prefix_tokens` that the request holds in the radix cache: SGLang wants 512
    tokens beside the prompt, and a longer prompt would wait for ever.
    """
    tokens = original(queue, req, allocated_tokens, prefix_tokens, *others)
    return _admissible(queue, req, min(tokens, queue.token_to_kv_pool_allocator.size - prefix_tokens))


def ask_cut_layers_again(original: Callable[..., tuple[int, int]], queue: Any, req: Any) -> tuple[int, int]:
    """The same for a request that was retracted and comes back from its backup."""
    tokens, window_tokens = original(queue, req)
    return _admissible(queue, req, tokens), window_tokens


def _admissible(queue: Any, req: Any, tokens: int) -> int:
    allocator = queue.token_to_kv_pool_allocator
    tokens = min(tokens, allocator.size)
    if _kept(allocator) is None:
        return tokens
    from pdtrim_sglang.kept_pool.admission import has_room

    prompt = prompt_tokens(req)
    room = has_room(queue, req, prompt, queue._pre_alloc_fill_len(req) - prompt)
    return tokens if room else allocator.size + allocator.page_size + 1


def next_step_fits(
    original: Callable[..., bool], allocator: Any, *, num_tokens: int, requests: Any = None, **others: Any
) -> bool:
    fits = original(allocator, num_tokens=num_tokens, requests=requests, **others)
    kept = _kept(allocator)
    return fits and (kept is None or not kept.missing([req.kv.req_pool_idx for req in requests]))


def longest_answer(
    original: Callable[..., int | None], allocator: Any, input_tokens: int, max_new_tokens: int, **others: Any
) -> int | None:
    """How long a request's answer can be if it has all pools for itself; None: its prompt does not fit."""
    most, kept = original(allocator, input_tokens, max_new_tokens, **others), _kept(allocator)
    if most is None or kept is None:
        return most
    prompt = min(input_tokens, allocator.size)  # SGLang refuses, or truncates, a longer one itself
    room = min(group.size - group.rule.rows(prompt) for group in kept.groups)
    # A share of a prompt that fills the whole layers may be more than there is in whole pages of a cut layer.
    return None if room < 0 else max(0, min(most, room - 1))


def leaks(violations: list[str], allocator: Any) -> list[str]:
    """SGLang asks when no request is left, and then every page must be free."""
    kept = _kept(allocator)
    return violations if kept is None else [*violations, *kept.leaks()]


def may_store_with_rope(original: Callable[..., bool], forward_batch: Any) -> bool:
    """Whether the kernel of a model's RoPE may store K and V, as SGLang lets it in bfloat16 on CUDA.

    It stores them at SGLang's slots, which are no slots of cut layers: there the attention backend stores.
    """
    from sglang.srt.model_executor.forward_context import get_token_to_kv_pool

    return getattr(get_token_to_kv_pool(), "kept", None) is None and original(forward_batch)
