"""Attention mass: the shares of attention that generated positions put on each part of the prompt.

Queries are continuation tokens only, so a layer's weights are `T x (N + T)`, never `N x N`, and only one layer's exist
at a time. The weights are those of the model's own eager attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.sublayers import has_attention
from pdtrim_deploy.plan import KVSend


@dataclass(frozen=True)
class AttentionMass:
    """Shares of attention, float64 `[KV layers, kv_heads]`, each the mean over queries and a KV head's queries.

    `first`, `last` and `middle` are of the prompt, `generated` of the continuation itself; the four sum to 1. A
    prompt of no more than `n_first + n_last` tokens has no middle, and what `first` covers is not in `last`.
    """

    first: Tensor
    last: Tensor
    middle: Tensor
    generated: Tensor

    @property
    def prompt_ends(self) -> Tensor:
        """float64 `[KV layers]`: mass on first and last prompt tokens, mean over KV heads."""
        return (self.first + self.last).mean(1)


@torch.no_grad()
def attention_mass(
    oracle: PDOracle,
    sequences: Tensor,
    prompt_tokens: int,
    n_first: int,
    n_last: int,
    *,
    batch: int = 4,
    progress: Callable[[str], None] = lambda _: None,
) -> AttentionMass:
    """Measure decode on `sequences`, int64 `[S, N + T]`, N = `prompt_tokens` and T >= 2.

    Decode reads all prompt KV, whatever the oracle's plan cuts; of a layer with a window, that window.
    """
    layers, heads = len(oracle.plan.kv), oracle.plan.model.num_kv_heads
    full = oracle.with_kv((KVSend(),) * layers)
    n, low = prompt_tokens, min(n_first, prompt_tokens)
    edges = (0, low, max(low, n - n_last), n, sequences.shape[1] - 1)
    total = torch.zeros(4, layers, heads, dtype=torch.float64)

    def add(layer: int, weights: Tensor) -> None:
        """`weights`: `[batch, heads, T - 1, N + T - 1]`."""
        grouped = weights.double().mean(2).unflatten(1, (heads, -1)).mean(2).sum(0)
        before = edges[-1] - grouped.shape[-1]  # rows before a layer's window, which it does not hold
        for part, (lo, hi) in enumerate(pairwise(max(0, edge - before) for edge in edges)):
            total[part, layer] += grouped[:, lo:hi].sum(-1).cpu()

    done = 0
    for part in sequences.split(batch):
        state = oracle.prefill(part[:, :n])
        with watch_attention(oracle.decode_model, add):
            full.extend(part[:, n:-1], n, full.hand_over(state))
        done += len(part)
        progress(f"attention mass: {done}/{len(sequences)} sequences")
    first, middle, last, generated = total / len(sequences)
    return AttentionMass(first, last, middle, generated)


@contextmanager
def watch_attention(model: Any, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `see(layer, weights)` after each attention module; eager attention alone returns its weights."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    hooks = [
        layer.self_attn.register_forward_hook(lambda _module, _args, out, index=index: see(index, out[1]))
        for index, layer in enumerate(filter(has_attention, model.model.layers))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(usual)
