"""What the tables of cut layers take of a GPU beside KV, which SGLang gives to the pool unless it is told."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.allocation_sizing import get_req_to_token_extra_context_len
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.runtime_context import get_disagg, get_exec

from pdtrim_sglang.kept_pool.build import planned
from pdtrim_sglang.kept_pool.group import table_width
from pdtrim_sglang.kept_pool.rule import kept_rules

ENTRY, LENGTH, GRAPH_INDEX = 4, 8, 8  # bytes: a slot of a table, a request's rows, an index that a CUDA graph reads


def table_bytes(configurator: Any, tokens: int) -> int:
    """Of all groups of the worker of SGLang's KVCacheConfigurator, when whole layers have `tokens`; 0 on a CPU.

    A table has a row for each row of `req_to_token`, and an attention backend with CUDA graphs an index for each slot
    that a captured batch could read (triton's int64; fa3 and trtllm_mha have one for a page).
    """
    cut = planned(configurator)
    if cut is None or configurator.device == "cpu":  # there the pool has the tokens that `serve` gives it
        return 0
    plan, split = cut
    page_size, graphs = configurator.pool_page_size, get_exec().graph.cuda_graph_config.decode
    captured = 0 if graphs.backend == Backend.DISABLED else graphs.max_bs or 0
    rows = configurator.resolve_max_num_reqs(tokens) + (get_disagg().disaggregation_decode_extra_slots or 0) + 1
    longest = configurator.model_config.context_len + get_req_to_token_extra_context_len()
    sends = {rule: plan.kv[layer] for layer, rule in kept_rules(plan).items()}
    widths = [table_width(split.slots(send, tokens, page_size), longest, page_size) for send in sends.values()]
    return sum(width * (ENTRY * rows + GRAPH_INDEX * captured) + LENGTH * rows for width in widths)
