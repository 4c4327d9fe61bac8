"""Key scales (`kvcache/key_offsets.py`): how large queries are beside keys, and what follows.

Quantised in int4 or int3, a head's channels are spread over each other by a rotation and share a scale, so all channels
get the same error e^2, in proportion to the sum of their squares. What counts is the error of a query's product with a
key, the sum over channels of q^2 e^2. With each channel times s before and divided by s after,

    (sum of s^2 k^2) * (sum of q^2 / s^2)

is least where s = (q^2 / k^2)^(1/4). RoPE turns the two channels of a pair into each other, so a pair has one scale,
from the means of its squares.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pdtrim_deploy.kvcache.key_constants import MAX_EXPONENT, STEPS
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.recipe.kv_cost import QUERIES_OF

SOURCES = ("q_norm", "q_proj", "qkv_proj")  # the last module before RoPE that queries come from, if a family has it
LEAST = 1e-9  # of the largest pair's: smaller squares count as this


def pair_sums(squares: Tensor) -> Tensor:
    """`[.., head_dim]` -> `[.., head_dim / 2]`: of channels i and head_dim / 2 + i together."""
    low, high = squares.chunk(2, -1)
    return low + high


@torch.no_grad()
def query_squares(oracle: PDOracle, sequences: Tensor) -> Tensor:
    """float64 `[KV layers of decode, kv_heads, head_dim / 2]`: mean square of a query by RoPE pair.

    Over all positions of `sequences`, int64 `[S, T]`, which decode runs by itself, and over a KV head's queries. Zeros
    where a family's queries cannot be seen.
    """
    model, runner = oracle.plan.model, oracle.decode
    heads, dim = int(oracle.decode_model.config.num_attention_heads), model.head_dim
    normed = any(hasattr(runner.layers[layer].self_attn, SOURCES[0]) for layer in runner.kv_layers)
    if normed and sequences.shape[1] == heads:  # else nobody could tell tokens from heads, whichever comes first
        sequences = sequences[:, :-1]
    tokens = sequences.shape[1]
    total = torch.zeros(len(runner.kv_layers), model.num_kv_heads, dim // 2, dtype=torch.float64)

    def add(of_layer: Tensor, _module: nn.Module, _arguments: Any, queries: Tensor) -> None:
        if queries.dim() == 4 and queries.shape[1:3] == (heads, tokens):  # norms behind a transpose: Exaone4, Apertus
            queries = queries.transpose(1, 2)
        rows = queries.reshape(queries.shape[0] * queries.shape[1], -1)[:, : heads * dim]
        squares = rows.float().square().mean(0, dtype=torch.float64).view(model.num_kv_heads, -1, dim).mean(1)
        of_layer += pair_sums(squares).cpu()

    hooks = []
    for of_layer, layer in zip(total, runner.kv_layers, strict=True):
        source = _source(runner.layers[layer].self_attn)
        hooks += [] if source is None else [source.register_forward_hook(partial(add, of_layer))]
    try:
        for few in sequences.split(QUERIES_OF):
            LayerRun(runner, few.split(1)).finish()
    finally:
        for hook in hooks:
            hook.remove()
    return total / len(sequences)


def _source(attention: Any) -> nn.Module | None:
    if hasattr(attention, "query_layernorm"):  # HunYuan's norm stands behind RoPE
        return None
    modules = (getattr(attention, name, None) for name in SOURCES)
    return next((module for module in modules if isinstance(module, nn.Module)), None)


def exponents(queries: Tensor, keys: Tensor) -> Tensor:
    """int8, of the shape of both: of scales next to (queries / keys)^(1/4), as `KeyConstants.of` has them.

    `queries` and `keys` are squares `[.., kv_heads, head_dim / 2]`. A head's exponents have about mean 0; all are 0 of
    a head whose squares are all zero, or not finite.
    """
    logs = [_floored(squares).log2() for squares in (queries, keys)]
    steps = (logs[0] - logs[1]) / 4 * STEPS
    steps = (steps - steps.mean(-1, keepdim=True)).round().clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return steps.nan_to_num(0.0).to(torch.int8)


def _floored(squares: Tensor) -> Tensor:
    return squares.maximum(squares.amax(-1, keepdim=True) * LEAST)
