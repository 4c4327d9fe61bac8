"""Sizes of latent attention (MLA), from config.json: what SGLang's pool holds of a token, and its heads.

Of each token a layer holds one latent, normalised, and one rope key, rotated; all heads read both. SGLang keeps them as
one row (MLATokenToKVPool: the latent, then the rope key), the same on every rank of tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pdtrim_deploy.errors import UserError

LATENT_KEY = "kv_lora_rank"
_KEYS = (LATENT_KEY, "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")


class LatentSizes(NamedTuple):
    """Numbers of a token's latent and rope key in a layer, and of a head's key without RoPE and its value."""

    latent: int
    rope: int
    key: int
    value: int


def attention_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of a block of DeepSeek's, on disk: names within the block and shapes, biases left out."""
    sizes = latent_sizes(config)
    assert sizes is not None
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config.get("q_lora_rank")
    query = heads * (sizes.key + sizes.rope)
    queries = {"q_a_proj": (rank, hidden), "q_a_layernorm": (rank,), "q_b_proj": (query, rank)} if rank else {}
    shapes: dict[str, tuple[int, ...]] = {
        **(queries or {"q_proj": (query, hidden)}),
        "kv_a_proj_with_mqa": (sizes.latent + sizes.rope, hidden),
        "kv_a_layernorm": (sizes.latent,),
        "kv_b_proj": (heads * (sizes.key + sizes.value), sizes.latent),
        "o_proj": (hidden, heads * sizes.value),
    }
    return {f"self_attn.{name}.weight": shape for name, shape in shapes.items()}


def has_latents(config: Mapping[str, Any]) -> bool:
    """Whether config.json tells of latents."""
    return bool(config.get(LATENT_KEY))


def latent_sizes(config: Mapping[str, Any]) -> LatentSizes | None:
    """Those of a config.json; None where it tells of no latents.

    Raises:
        UserError: a size is missing, no whole number, or odd where a row travels in halves.

    """
    if not has_latents(config):
        return None
    for key in _KEYS:
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise UserError(f"config.json: key {key} is {value!r}; it must be a whole number of at least 1")
        if key in _KEYS[:2] and value % 2:
            raise UserError(f"config.json: key {key} is {value}; it must be even, as such rows travel in halves")
    return LatentSizes(*(config[key] for key in _KEYS))
