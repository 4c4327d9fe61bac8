"""Run by test_attention_backends.py under TRITON_INTERPRET=1: SGLang's attention backends on a decode worker's memory.

    interpreted_attention_child.py BACKEND STEPS ...    # each in a process forked from this one, which imports SGLang

`triton` is SGLang's own to the last kernel. Of the others SGLang's part is genuine, metadata kernels included, and the
libraries' kernels are stood in for in torch, as they are called: FlashInfer's wrapper plans over pages of one token,
`flash_attn_with_kvcache` and `trtllm_batch_decode_with_kv_cache` read a page table.
"""

import itertools
import multiprocessing
import random
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from decodeworker import DIM, HEADS, KV_HEADS, DecodeWorker, Graph, history, make_plan, sglang, sparse

from pdtrim_deploy.plan import KVSend

PLAN = make_plan([KVSend(), sparse(3, 5), sparse(0, 9), sparse(3, 5), sparse(4, 0)])


def attend(q, keys, values, scale):
    """q `[heads, dim]`; keys, values `[tokens, kv_heads, dim]`."""
    keys, values = (rows.repeat_interleave(HEADS // KV_HEADS, 1) for rows in (keys, values))
    weights = torch.softmax(torch.einsum("hd,nhd->hn", q, keys) * scale, -1)
    return torch.einsum("hn,nhd->hd", weights, values)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, page_table, cache_seqlens, cu_seqlens_q, max_seqlen_q, softmax_scale, causal, window_size,
    softcap, ver, **options,
):  # fmt: skip
    """FlashAttention 3 for one query token a request: caches `[pages, page_size, kv_heads, dim]`."""
    assert (page_table.dtype, cache_seqlens.dtype) == (torch.int32, torch.int32)
    assert (max_seqlen_q, causal, window_size, softcap, ver) == (1, True, (-1, -1), 0.0, 3)
    assert cu_seqlens_q.tolist() == list(range(len(q) + 1))
    out = torch.empty_like(q)
    for i, length in enumerate(cache_seqlens.tolist()):
        pages = page_table[i, : -(-length // k_cache.shape[1])].long()
        rows = (cache[pages].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        out[i] = attend(q[i], *rows, softmax_scale)
    return out


def trtllm_batch_decode_with_kv_cache(
    query, kv_cache, workspace_buffer, block_tables, seq_lens, max_seq_len, bmm1_scale, bmm2_scale, window_left, sinks,
    out, kv_cache_sf, **options,
):  # fmt: skip
    """TensorRT-LLM's decode in FlashInfer: caches `[pages, kv_heads, page_size, dim]`."""
    assert (block_tables.dtype, seq_lens.dtype) == (torch.int32, torch.int32)
    assert (bmm2_scale, window_left, sinks, out, kv_cache_sf) == (1.0, -1, None, None, None)
    assert int(seq_lens.max()) <= max_seq_len <= block_tables.shape[1] * kv_cache[0].shape[2]
    result = torch.empty_like(query)
    for i, length in enumerate(seq_lens.tolist()):
        pages = block_tables[i, : -(-length // kv_cache[0].shape[2])].long()
        rows = (cache[pages].transpose(1, 2).flatten(0, 1)[:length] for cache in kv_cache)
        result[i] = attend(query[i], *rows, bmm1_scale)
    return result


class Wrapper:
    """FlashInfer's BatchDecodeWithPagedKVCacheWrapper; with `use_cuda_graph` its buffers are given, and stay."""

    def __init__(
        self, workspace, layout, backend="auto", use_tensor_cores=False, use_cuda_graph=False,
        paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None,
    ):  # fmt: skip
        assert layout == "NHD"
        self.is_cuda_graph_enabled, self._paged_kv_indices_buf = use_cuda_graph, paged_kv_indices_buffer
        self._indptr = paged_kv_indptr_buffer

    def begin_forward(self, indptr, indices, last_page_len, heads, kv_heads, dim, page_size, **options):
        assert (indptr.dtype, indices.dtype, last_page_len.dtype) == (torch.int32,) * 3
        assert (heads, kv_heads, dim, page_size) == (HEADS, KV_HEADS, DIM, 1)
        assert last_page_len.tolist() == [1] * (len(indptr) - 1)
        on_host = options.get("global_override_indptr_cpu")
        assert on_host is None or torch.equal(on_host, indptr)
        if self.is_cuda_graph_enabled:
            assert indices is self._paged_kv_indices_buf
            self._indptr.copy_(indptr)
        else:
            self._indptr, self._paged_kv_indices_buf = indptr.clone(), indices

    def forward(self, q, kv_cache, sm_scale, **options):
        out = torch.empty_like(q)
        for i, (start, stop) in enumerate(itertools.pairwise(self._indptr.tolist())):
            slots = self._paged_kv_indices_buf[start:stop].long()
            out[i] = attend(q[i], *(cache[slots] for cache in kv_cache), sm_scale)
        return out


def on_the_cpu(function):
    return lambda *args, device=None, **options: function(*args, **options, device="cpu")


def stand_in(backend):
    """Put torch in the place of the library whose kernels `backend` calls."""
    from sglang.srt.layers.attention import attention_registry

    attention_registry.get_device_capability = lambda *_: (9, 0)
    if backend == "fa3":
        library = ModuleType("sgl_kernel.flash_attn")
        library.flash_attn_varlen_func = library.get_scheduler_metadata = lambda **_: None
        library.flash_attn_with_kvcache = flash_attn_with_kvcache
        sys.modules["sgl_kernel.flash_attn"] = library
        from sglang.srt.layers.attention import flashattention_backend as module

        module.flash_attn_with_kvcache, module.get_device_capability = flash_attn_with_kvcache, lambda *_: (9, 0)
    elif backend in ("flashinfer", "trtllm_mha"):
        from sglang.srt.layers.attention import flashinfer_backend as module

        module.BatchDecodeWithPagedKVCacheWrapper = Wrapper
        module.BatchPrefillWithPagedKVCacheWrapper = module.BatchPrefillWithRaggedKVCacheWrapper = lambda *_, **__: None
        module.fast_decode_plan = Wrapper.begin_forward
        module.should_use_tensor_core = lambda **_: False
        torch.empty, torch.zeros = on_the_cpu(torch.empty), on_the_cpu(torch.zeros)  # SGLang names "cuda" there
        if backend == "trtllm_mha":
            decode = SimpleNamespace(trtllm_batch_decode_with_kv_cache=trtllm_batch_decode_with_kv_cache)
            utils = SimpleNamespace(
                get_device_sm_count=lambda _: 132, get_trtllm_gen_multi_ctas_kv_counter_bytes=lambda *_: 1
            )
            from sglang.srt.layers.attention import trtllm_mha_backend, trtllm_mla_backend

            for module in (trtllm_mha_backend, trtllm_mla_backend):
                module.flashinfer = SimpleNamespace(decode=decode, utils=utils)


def close(answer, expected):
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-5)


def main(backend, steps):
    stand_in(backend)
    # 64 is the default; trtllm_mha takes none below 16, and Triton's kernels are slow in the interpreter.
    pages = {"trtllm_mha": {0: 16, 1: 64}, "triton": {0: 1, 1: 64, 3: 16}}.get(backend, {0: 1, 1: 64, 2: 16})
    for seed, page_size in pages.items():
        torch.manual_seed(seed)
        folder, sizes = Path(tempfile.mkdtemp()), {"isl": 20, "osl": 10}
        worker = DecodeWorker(folder, PLAN, page_size, sizes, backend)
        assert history(worker, random.Random(seed), steps, close, Graph(worker, 3)) == steps


if __name__ == "__main__":
    with sglang():
        import sglang.srt.layers.attention.attention_registry  # once, for all of them

        fork = multiprocessing.get_context("fork")
        for name, steps in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
            process = fork.Process(target=main, args=(name, int(steps)))
            process.start()
            process.join()
            print(name, "ended with", process.exitcode, flush=True)
