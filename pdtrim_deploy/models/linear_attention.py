"""Blocks with linear attention (gated delta nets), run behind the state that they keep, and what of it travels.

A block's modules are transformers', and so is the cache of one layer that they read and write; it is filled from a
`LayerKV` before each call and read out behind it. Its convolution's state has a column that no later token reads (the
kernel's own place), and its recurrent state keys before values: SGLang's MambaPool has neither, so `to_pool` and
`from_pool` say what a worker holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pdtrim_deploy.plan import LinearStates

State = tuple[Tensor, Tensor]
"""`[batch, channels, kernel]`, the model's dtype, and float32 `[batch, value_heads, key_dim, value_dim]`."""


def keeps_state(layer: Any) -> bool:
    """Whether a decoder layer has linear attention, built as Qwen3-Next's is."""
    return hasattr(layer, "linear_attn")


class StateCache:
    """Stands in for transformers' Cache in one call of a layer with linear attention; `state` stays as it is."""

    def __init__(self, layer_idx: int, state: State | None) -> None:
        from transformers.cache_utils import LinearAttentionLayer

        cache: Any = LinearAttentionLayer()
        if state is not None:
            cache.lazy_initialization(*state)
            for kept, before in zip((cache.conv_states, cache.recurrent_states), state, strict=True):
                kept[0].copy_(before)
            cache.has_previous_state[0] = True
        self.layers, self._cache = {layer_idx: cache}, cache

    @property
    def state(self) -> State:
        """What the call has left behind."""
        return self._cache.conv_states[0], self._cache.recurrent_states[0]

    def has_previous_state(self, layer_idx: int, state_idx: int = 0) -> bool:
        """Whether there is a state to go on from."""
        return bool(self.layers[layer_idx].has_previous_state[state_idx])

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, **options: Any) -> Tensor:
        """As transformers' `Cache.update_conv_state`."""
        return self.layers[layer_idx].update_conv_state(conv_states, **options)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **options: Any) -> Tensor:
        """As transformers' `Cache.update_recurrent_state`."""
        return self.layers[layer_idx].update_recurrent_state(recurrent_states, **options)


def run_layer(layer: Any, hidden: Tensor, state: State | None, branches: int = 1) -> tuple[Tensor, State]:
    """The layer's output for `hidden`, `[batch, tokens, hidden]`, behind `state`, and the state behind them.

    With several `branches`, alternatives of equal length side by side, each goes on from `state` by itself.
    """
    if branches > 1 and state is not None:
        state = state[0].repeat_interleave(branches, 0), state[1].repeat_interleave(branches, 0)
    cache = StateCache(layer.linear_attn.layer_idx, state)
    alternatives = hidden.unflatten(1, (branches, -1)).flatten(0, 1)
    out = layer(alternatives, position_embeddings=None, attention_mask=None, past_key_values=cache, use_cache=True)
    return out.unflatten(0, (-1, branches)).flatten(1, 2), cache.state


def to_pool(state: State, states: LinearStates, device: torch.device) -> State:
    """What SGLang's pool holds of it: `[batch, *conv_shape]` and `[batch, *recurrent_shape]` in the plan's dtypes."""
    conv, recurrent = state
    dtypes = (getattr(torch, name) for name in (states.conv_dtype, states.recurrent_dtype))
    sides = conv[..., -states.conv_columns :], recurrent.transpose(-1, -2)
    first, second = (side.to(device, dtype).contiguous() for side, dtype in zip(sides, dtypes, strict=True))
    return first, second


def from_pool(state: State, dtype: torch.dtype) -> State:
    """What a layer that computes in `dtype` reads of it."""
    conv, recurrent = state
    return nn.functional.pad(conv.to(dtype), (1, 0)), recurrent.transpose(-1, -2).float()
