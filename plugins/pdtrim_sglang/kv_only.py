"""Prefill layers that are there for their K and V alone: skip their attention, o_proj and MLP.

In the checkpoint o_proj and down_proj of such a layer are zero, so this changes no result, only the time. Written
against the decoder layers of SGLang 0.5.23 (models/llama.py, qwen2.py, qwen3.py): `self_attn.attn`,
`self_attn.o_proj`, `mlp`. An engine's graph leaves those out and asks only that K and V are written.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pdtrim_deploy.plan import PDPlan


def skip_all_but_kv(model: Any, plan: PDPlan, pool: Any) -> None:
    """Make `model` of the prefill stage, SGLang's own or ours, skip what the plan's KV-only layers need not compute.

    `pool` is SGLang's KV pool of this worker (token_to_kv_pool).
    """
    for index in plan.kv_only_layers:
        if hasattr(model, "write_only"):  # an engine
            model.write_only(index, pool)
            continue
        layers = model.model.layers
        attention = layers[index].self_attn
        attention.attn = WriteKV(attention.attn, pool)
        attention.o_proj = ZeroProjection(attention.o_proj.weight.shape[0])
        layers[index].mlp = ZeroMLP()


class WriteKV(nn.Module):
    """Puts K and V into SGLang's pool, as its attention backend would, and attends to nothing."""

    def __init__(self, attention: Any, pool: Any) -> None:
        super().__init__()
        self.attention, self._pool = attention, pool

    def forward(self, q: Tensor, k: Tensor, v: Tensor, forward_batch: Any, **_: Any) -> Tensor:
        """`q` as it is; k, v `[tokens, kv_heads * head_dim]`."""
        heads = self.attention.tp_k_head_num
        rows = (x.view(-1, heads, self.attention.head_dim) for x in (k, v))
        self._pool.set_kv_buffer(self.attention, forward_batch.out_cache_loc, *rows)
        return q


class ZeroProjection(nn.Module):
    """In the place of a projection back to the hidden size."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """Zeros `[tokens, hidden]`, and no bias: what SGLang's linear layers return."""
        return x.new_zeros(x.shape[0], self.hidden), None


class ZeroMLP(nn.Module):
    """In the place of an MLP."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Zeros like `x`."""
        return x.new_zeros(x.shape)
