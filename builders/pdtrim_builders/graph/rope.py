"""Rotary embeddings as a table of angles: the RoPE kinds that Llama, Mistral, Qwen2 and Qwen3 use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.config import rope_of

Scaling = Callable[[Tensor, Mapping[str, Any]], Tensor]


def _default(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    return frequencies


def _linear(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Position interpolation (arXiv:2306.15595)."""
    return frequencies / rope["factor"]


def _llama3(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between interpolated."""
    context, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    waves = 2 * math.pi / frequencies
    smooth = (context / waves - low) / (high - low)
    between = (1 - smooth) * frequencies / rope["factor"] + smooth * frequencies
    scaled = torch.where(waves > context / low, frequencies / rope["factor"], between)
    return torch.where(waves < context / high, frequencies, scaled)


KINDS: dict[str, Scaling] = {"default": _default, "linear": _linear, "llama3": _llama3}


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE of a config.json as one dict, checked.

    Raises UserError: an unsupported kind, a partial rotation, a missing or wrong number.
    """
    rope = rope_of(config)
    if rope["rope_type"] not in KINDS:
        raise UserError(f"RoPE of kind {rope['rope_type']!r} is not supported; supported: {', '.join(KINDS)}")
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if part not in (None, 1, 1.0):
        raise UserError(f"RoPE of a part of each head (partial_rotary_factor {part}) is not supported")
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    context = rope.get("original_max_position_embeddings", config.get("max_position_embeddings"))
    rope["original_max_position_embeddings"] = context
    for key in ("rope_theta", *needed.get(rope["rope_type"], ())):
        if not isinstance(rope.get(key), int | float) or rope[key] <= 0:
            raise UserError(f"RoPE of kind {rope['rope_type']!r} needs a positive {key}, not {rope.get(key)!r}")
    return rope


def rope_table(rope: Mapping[str, Any], head_dim: int, positions: int) -> Tensor:
    """float32 `[positions, head_dim]`: cosines, then sines, of each position's `head_dim / 2` angles.

    A table instead of Cos nodes, because at position 100,000 a GPU's fast cosine is wrong in the first digits.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = KINDS[rope["rope_type"]](1.0 / rope["rope_theta"] ** exponents, rope)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)
