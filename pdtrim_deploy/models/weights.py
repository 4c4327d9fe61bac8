"""How many weights a model has, from its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from pdtrim_deploy.models.families import known_family

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def parameters(config: Mapping[str, Any]) -> int:
    """Weights of a Llama-like model, norms and biases left out: less than one per mille."""
    blocks, block, ends = block_sizes(config)
    smaller = sum(_mlp(config, blocks - 1) - _mlp(config, number) for number in range(blocks))
    return blocks * block - smaller + ends


def block_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Blocks, weights of each (of one with experts, where some have none), and of embedding and LM head."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    blocks = config["num_hidden_layers"]
    block = 2 * hidden * head * (heads + kv_heads) + _mlp(config, blocks - 1)
    ends = 1 if config.get("tie_word_embeddings") else 2
    return blocks, block, ends * config["vocab_size"] * hidden


def _mlp(config: Mapping[str, Any], block: int) -> int:
    """Weights of a block's MLP, or of all its experts and their router."""
    hidden, family = config["hidden_size"], known_family((config.get("architectures") or [""])[0])
    if family.blocks is None:  # by the names that most have
        experts = next((config[key] for key in _EXPERTS if config.get(key)), 1)
        width = config.get("moe_intermediate_size", config["intermediate_size"]) if experts > 1 else None
        return 3 * hidden * (width or config["intermediate_size"]) * experts
    tensors = family.block_tensors(config, block).items()
    return sum(prod(shape) for name, shape in tensors if not name.startswith("self_attn.") and len(shape) > 1)
