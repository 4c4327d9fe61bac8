"""Prefill layers that are there for their K and V alone: attention, Q, o_proj and MLP are cut out of a loaded model.

In the checkpoint o_proj and down_proj of such a layer are zero, so this changes no result, only time and memory. It is
done before SGLang captures CUDA graphs, which read the weights of their capture for ever. Written against the decoder
layers of SGLang 0.5.23 (models/llama.py, qwen2.py, qwen3.py): `self_attn.attn`, `self_attn.qkv_proj`,
`self_attn.o_proj`, `mlp`, `post_attention_layernorm`. An engine's graph leaves those out, and only writes K and V
(models/stage.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.attention.graph_utils import padded_extend_real_tokens
from sglang.srt.layers.linear import QKVParallelLinear
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.model_executor.forward_context import get_token_to_kv_pool
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import eager_on_graph
from sglang.srt.model_executor.runner_utils.forward_batch import get_forward_batch
from sglang.srt.model_executor.runner_utils.prefill_graph import is_in_prefill_graph_scope
from sglang.srt.utils.common import use_intel_amx_backend
from torch import Tensor, nn

from pdtrim_sglang.sublayers import cut_mlp, free

ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def keep_only_kv(layer: Any, hidden: int) -> int:
    """Cut one decoder layer of SGLang's, in a model of `hidden` values a token; returns the bytes of weights freed."""
    attention = layer.self_attn
    freed = free(attention.o_proj) + cut_mlp(layer)
    attention.attn, attention.o_proj = WriteKV(attention.attn), ZeroProjection(hidden)
    projection: Any = getattr(attention, "qkv_proj", None)
    if _has_plain_rows(projection):
        projection.forward = KVProjections(projection)
        freed += projection.forward.freed
    return freed


def _has_plain_rows(projection: Any) -> bool:
    """Whether its weight is Q's rows, K's and V's, as the checkpoint has them: neither quantised nor packed."""
    if type(projection) is not QKVParallelLinear or type(projection.quant_method) is not UnquantizedLinearMethod:
        return False
    rows = projection.q_proj_shard_size + projection.kv_proj_shard_size + projection.v_proj_shard_size
    tensors = [parameter.data for parameter in projection.parameters()]
    plain = all(type(data) is torch.Tensor and len(data) == rows and data.dtype in ROW_DTYPES for data in tensors)
    return plain and not (use_intel_amx_backend(projection) or projection.skip_bias_add)


class WriteKV(nn.Module):
    """Puts K and V into SGLang's pool, as RadixAttention would have its backend do, and attends to nothing."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention, self.layer_id = attention, attention.layer_id  # SGLang's graphs know attentions by `layer_id`

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, forward_batch: Any, save_kv_cache: bool = True, **_: Any
    ) -> Tensor:
        """`q` as it is; k, v `[tokens, kv_heads * head_dim]`, rows of padding behind the batch's own included."""
        if not save_kv_cache:
            return q
        if is_in_prefill_graph_scope() and forward_batch.forward_mode.is_extend():
            self._write_between_graphs(k, v)
        else:
            self._write(k, v, forward_batch, padded_extend_real_tokens(q, forward_batch))
        return q

    @eager_on_graph
    def _write_between_graphs(self, k: Tensor, v: Tensor) -> None:
        """Called again at each replay, with the tensors of the capture: pool and batch are the replay's."""
        batch = get_forward_batch()
        self._write(k, v, batch, batch.global_num_token_non_padded_cpu)

    def _write(self, k: Tensor, v: Tensor, batch: Any, tokens: int | None) -> None:
        """Write the first `tokens` rows; None: all."""
        pool = get_token_to_kv_pool()
        # As an attention does: rows of the prefix that HiCache is loading from the host are in this layer when the
        # forward pass ends, since the transfer reads them then.
        pool.get_key_buffer(self.layer_id)
        if tokens == 0:
            return
        shape = (-1, self.attention.tp_k_head_num, self.attention.head_dim)
        rows = (x[:tokens].view(shape) for x in (k, v))
        pool.set_kv_buffer(self.attention, batch.out_cache_loc[:tokens], *rows)


class KVProjections:
    """Stands in for `forward` of SGLang's QKVParallelLinear, whose rows of Q it drops: K and V as before, Q is zero.

    The module and its parameters keep their names. Weights that are loaded later find their places: those of Q none.

    Attributes:
        freed: bytes of the dropped rows.

    """

    def __init__(self, projection: Any) -> None:
        self._rows: Callable[[Tensor], tuple[Tensor, None]] = projection.forward
        self._queries, self.freed = projection.q_proj_shard_size, 0
        projection.num_heads = projection.q_proj_shard_size = 0
        for parameter in projection.parameters():
            queries, rest = parameter.data.split([self._queries, len(parameter) - self._queries])
            self.freed += queries.nbytes
            parameter.data = rest.clone()

    def __call__(self, x: Tensor) -> tuple[Tensor, None]:
        """`[tokens, (heads + 2 * kv_heads) * head_dim]`, and no bias: as of all rows, but for Q."""
        kv, _ = self._rows(x)
        return torch.cat((kv.new_zeros(len(kv), self._queries), kv), 1), None


class ZeroProjection(nn.Module):
    """In the place of a projection back to the hidden size."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Zeros `[tokens, hidden]`, and no bias: what SGLang's linear layers return."""
        return x.new_zeros(x.shape[0], self.hidden), None
