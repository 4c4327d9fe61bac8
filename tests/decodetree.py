"""SGLang's own radix cache over its own pools, as a worker's scheduler uses it."""

from array import array
from types import SimpleNamespace

from decodeworker import make_memory, make_plan

from pdtrim_deploy.plan import KVSend

INT8 = (KVSend(wire_dtype="int8"),)
PROMPT, NEW = 21, 12  # tokens; a second turn on top fits the context of 64


class Decode:
    """A decode worker's tree after `keep_received_rows_only` has seen it."""

    def __init__(self, folder, page_size, serves_plan=True, sends=INT8, eagle=False):
        from pdtrim_sglang.patches.reuse import keep_received_rows_only
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        self.plan = make_plan(sends)
        self.requests, self.allocator = make_memory(folder, self.plan, page_size)
        params = CacheInitParams(
            disable=False, req_to_token_pool=self.requests, token_to_kv_pool_allocator=self.allocator,
            page_size=page_size, tree_components=(ComponentType.FULL,), is_eagle=eagle,
        )  # fmt: skip
        self.tree = UnifiedRadixCache(params)
        manager = SimpleNamespace(serves_plan=serves_plan)
        assert keep_received_rows_only(manager, SimpleNamespace(tree_cache=self.tree)) is manager

    def request(self, tokens):
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        params = SamplingParams(max_new_tokens=NEW)
        params.normalize(None)
        return Req(rid="r", origin_input_text="", origin_input_ids=array("q", tokens), sampling_params=params)

    def receive(self, req):
        """As DecodePreallocQueue does: match, allocate the rest. Returns the length of the matched prefix."""
        from sglang.srt.disaggregation.decode import alloc_for_decode_prealloc
        from sglang.srt.mem_cache.common import match_kv_cache

        match = match_kv_cache(req, self.tree, req.origin_input_ids)
        req.lock = self.tree.lock(match.last_device_node)
        prefix = self.tree.prefix_device_indices(req)
        (row,) = self.requests.alloc([req])
        length, prompt_tokens = len(prefix), len(req.origin_input_ids)
        req.kv.kv_committed_len, req.kv.cache_protected_len = prompt_tokens, length
        slots = alloc_for_decode_prealloc(
            self.allocator, req=req, fill_len=prompt_tokens, delta_len=prompt_tokens - length, prefix_len=length,
            total_prefix_len=length, prefix_indices=prefix, uses_swa_tail=False, swa_tail_len=0,
        )  # fmt: skip
        self.requests.write((row, slice(0, length)), prefix.int())
        self.requests.write((row, slice(length, prompt_tokens)), slots.int())
        req.full_untruncated_fill_ids, req.extend_end = req.origin_input_ids + req.output_ids, prompt_tokens
        return length

    def answer(self, req, tokens):
        """As a decode worker does once the rows are there: the first token is prefill's, the others have rows here."""
        from sglang.srt.managers.schedule_batch import FINISH_LENGTH
        from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache

        checkpoint_kv_cache(req, self.tree)
        row, page_size = req.kv.req_pool_idx, self.allocator.page_size
        for token in tokens:
            req.output_ids.append(token)
            if token == tokens[-1]:  # its row is never made
                break
            at = req.kv.kv_allocated_len
            last = self.requests.req_to_token[row, at - 1]
            self.requests.req_to_token[row, at] = last + 1 if at % page_size else self.allocator.alloc(page_size)[0]
            req.kv.kv_allocated_len = req.kv.kv_committed_len = at + 1
        req.finished_reason, req.finished_len = FINISH_LENGTH(len(tokens)), len(tokens)
        release_kv_cache(req, self.tree, checkpoint=True)

    def match(self, tokens):
        from sglang.srt.mem_cache.common import match_kv_cache

        req = self.request(tokens)
        match_kv_cache(req, self.tree, req.origin_input_ids)
        return self.tree.prefix_device_indices(req)
