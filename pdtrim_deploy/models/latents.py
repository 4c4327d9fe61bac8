"""Attention that keeps latents (MLA), run so that a layer holds what SGLang's pool does.

transformers' DeepSeek attention makes K and V of all heads from each token's latent and rope key, and gives them to its
cache (later versions, as SGLang's environment has, give it the two themselves). Served, a token's row is the latent,
behind its norm, and the rope key, behind its rotation; so these are what `LayerKV` holds here, travels, and is rounded.
K and V are made of them anew for each call, by the layer's own map. No import of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def keeps_latents(attention: Any) -> bool:
    """Whether an attention module is DeepSeek's."""
    return all(hasattr(attention, name) for name in ("kv_lora_rank", "qk_rope_head_dim", "kv_b_proj"))


class LatentCache:
    """Stands in for transformers' Cache in one call of an attention module; what it keeps goes to `kv`.

    `kv` (`blockwise.LayerKV`) holds rope keys in the place of keys, `[batch, 2, tokens, rope / 2]`, and latents in that
    of values, `[batch, 2, tokens, latent / 2]`: in halves, as they travel, channels in the order of SGLang's pool.
    """

    def __init__(self, attention: Any, kv: Any) -> None:
        self.attention, self.kv = attention, kv
        self._latents: Tensor | None = None

    def see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A hook before `kv_b_proj`: of its calls the first is the module's own, of this call's latents."""
        if self._latents is None:
            self._latents = inputs[0]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep what the layer computed, `[batch, heads, tokens, ..]`; the same of all that is kept, for attention."""
        attention, latents = self.attention, self._latents
        if latents is None:  # it has not mapped them yet: `keys` are latents, `values` rope keys
            rope, kept = self._keep(values[:, 0], keys[:, 0])
            return kept[:, None], rope[:, None]
        rotated = keys[:, 0, :, attention.qk_nope_head_dim :]  # the same in all heads
        rope, kept = self._keep(rotated, latents)
        by_head = attention.kv_b_proj(kept).unflatten(-1, (keys.shape[1], -1)).transpose(1, 2)
        nope, expanded = by_head.split([attention.qk_nope_head_dim, attention.v_head_dim], -1)
        return torch.cat((nope, rope[:, None].expand(*nope.shape[:-1], -1)), -1), expanded

    def _keep(self, rope: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """`[batch, tokens, ..]` of this call's tokens -> of all that `kv` holds."""
        kept = self.kv.update(_halves(_as_served(rope, self.attention)), _halves(latents))
        every_rope, every_latent = map(_whole, kept)
        return _as_computed(every_rope, self.attention), every_latent


@contextmanager
def latent_cache(attention: Any, kv: Any) -> Iterator[LatentCache]:
    """A cache for one call of the layer that `attention` is of."""
    cache = LatentCache(attention, kv)
    hook = attention.kv_b_proj.register_forward_pre_hook(cache.see, prepend=True)
    try:
        yield cache
    finally:
        hook.remove()


def as_sglang(model: Any) -> None:
    """Give a transformers model the two numbers in which SGLang 0.5.23's DeepSeek differs from transformers 5's.

    transformers' DeepSeek-V2 leaves out YaRN's factor on scores (V3 and the authors' own code have it), and its norms
    of latents have an epsilon of their own where SGLang takes the model's.
    """
    config = model.config
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.scaling = attention.qk_head_dim**-0.5 * _yarn_factor(config.rope_parameters or {})
        for name in ("kv_a_layernorm", "q_a_layernorm"):
            if (norm := getattr(attention, name, None)) is not None:
                norm.variance_epsilon = config.rms_norm_eps


def _yarn_factor(rope: dict[str, Any]) -> float:
    """By which YaRN scales scores."""
    factor, scale = float(rope.get("factor") or 1), float(rope.get("mscale_all_dim") or 0)
    if rope.get("rope_type", "default") == "default" or factor <= 1:
        return 1.0
    return (0.1 * scale * math.log(factor) + 1) ** 2


def _turns_pairs(attention: Any) -> bool:
    """Whether the module turns pairs of neighbours, as SGLang does, and puts the two of each pair into two halves."""
    return bool(getattr(attention.config, "rope_interleave", False))


def _as_served(rope: Tensor, attention: Any) -> Tensor:
    """`[.., rope]` in SGLang's order of channels."""
    return rope.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if _turns_pairs(attention) else rope


def _as_computed(rope: Tensor, attention: Any) -> Tensor:
    """The inverse."""
    return rope.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if _turns_pairs(attention) else rope


def _halves(rows: Tensor) -> Tensor:
    """`[batch, tokens, size]` -> `[batch, 2, tokens, size / 2]`."""
    return rows.unflatten(-1, (2, -1)).transpose(1, 2)


def _whole(halves: Tensor) -> Tensor:
    """The inverse."""
    return halves.transpose(1, 2).flatten(-2)
