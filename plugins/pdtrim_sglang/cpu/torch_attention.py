"""torch_native on a CPU with what SGLang 0.5.23's lacks: sinks, reads of its pool of windows by that pool's slots, the
length of what pads a batch under DP attention, and tails of prompts that cost no more than their own queries.

SGLang's computes attention of all tokens of a prompt for each part of it, and keeps the part's. Ours computes the
part's alone: of 128 tokens behind 1,792 in an eighth of the time. Other chunks stay SGLang's: by ours, rows of a prefix
hit differed enough from those of the whole prompt to be quantised to another code.

A sink is one more logit of a head, which takes part in the softmax and brings no value. Here it is one more key:
queries, keys and values get a channel, in which a query has its head's sink, tokens' keys have 0, and the sink's key
alone has 1. So `scaled_dot_product_attention` computes what gpt-oss does (transformers' eager_attention_forward of
GptOss, SGLang's Triton kernels) in blocks, as without sinks.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


class TorchAttention(TorchNativeAttnBackend):
    """For decoders: a query attends to itself and to tokens before it, in layers with a window to so many of them.

    Attributes:
        own_queries: compute attention of a batch's queries alone where that is less; set for tails of prompts.

    """

    own_queries = False

    def get_cpu_graph_seq_len_fill_value(self) -> int:
        """Tokens of a request that only pads a batch to another rank's; as SGLang's backend for AMX says."""
        return 1

    def forward_extend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if not (self._needs_ours(layer, sinks) or self.own_queries):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        before, counts = forward_batch.extend_prefix_lens.tolist(), forward_batch.extend_seq_lens.tolist()
        if not (self._needs_ours(layer, sinks) or _saves_scores(q, layer, before, counts)):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache, sinks, before, counts)

    def forward_decode(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool = True,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if not self._needs_ours(layer, sinks):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        before = (forward_batch.seq_lens - 1).tolist()
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache, sinks, before, [1] * len(before))

    def _needs_ours(self, layer: Any, sinks: Tensor | None) -> bool:
        """Whether SGLang's own would be wrong."""
        return sinks is not None or self._in_windows(layer)

    def _in_windows(self, layer: Any) -> bool:
        return self.use_sliding_window_kv_pool and self.token_to_kv_pool.layers_mapping[layer.layer_id][1]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, batch: Any, save: bool, sinks: Tensor | None,
        before: list[int], counts: list[int],
    ) -> Tensor:  # fmt: skip
        """`[tokens, heads * dim]` of requests that have `before` tokens in the pool and `counts` in `q`."""
        pool = self.token_to_kv_pool
        if save:
            pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, self.swa_out_cache_loc), k, v)
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        rows = batch.req_pool_indices.tolist()
        queries, outputs = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim).split(counts), []
        for query, row, first in zip(queries, rows, before, strict=True):
            slots = self.req_to_token_pool.req_to_token[row, : first + len(query)].long()
            if self._in_windows(layer):
                slots = pool.translate_loc_from_full_to_swa(slots)
            held = keys[slots].to(q.dtype), values[slots].to(q.dtype)
            outputs.append(attend(query, *held, layer.scaling, layer.sliding_window_size, sinks))
        return torch.cat(outputs).flatten(1)


def _saves_scores(q: Tensor, layer: Any, before: list[int], counts: list[int]) -> bool:
    """Whether these parts of prompts have fewer scores than SGLang computes, which skips those behind a query."""
    decoder = layer.attn_type == AttentionType.DECODER and not layer.is_cross_attention
    if not decoder or layer.qk_head_dim != layer.v_head_dim or len(q) != sum(counts):
        return False
    return sum((first + count) * (count - first) for first, count in zip(before, counts, strict=True)) < 0


def attend(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None, sinks: Tensor | None
) -> Tensor:
    """`[queries, heads, dim]`: of the last tokens of a text to all of it.

    Args:
        query: `[queries, heads, dim]`.
        keys, values: `[tokens, kv_heads, dim]`, in the queries' dtype.
        scaling: of scores.
        window: how many tokens before itself a query attends to; None or -1: to all.
        sinks: `[heads]`, or none.

    """
    at = torch.arange(len(keys) - len(query), len(keys)).unsqueeze(1)
    distance = at - torch.arange(len(keys))
    mask = distance >= 0
    if window is not None and window >= 0:
        mask &= distance <= window
    if sinks is not None:
        mask = pad(mask, (0, 1), value=True)
        query = torch.cat((query, (sinks.float() / scaling).to(query.dtype).expand(len(query), -1)[..., None]), -1)
        keys, values = (pad(side, (0, 1, 0, 0, 0, 1)) for side in (keys, values))
        keys[-1, :, -1] = 1
    q, k, v = (side.transpose(0, 1)[None] for side in (query, keys, values))
    output = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
    output = output[0].transpose(0, 1)
    return output if sinks is None else output[..., :-1]
