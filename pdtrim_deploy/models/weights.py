"""How many weights a model has, from its config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def parameters(config: Mapping[str, Any]) -> int:
    """Weights of a Llama-like model, norms and biases left out: less than one per mille."""
    blocks, block, ends = block_sizes(config)
    return blocks * block + ends


def block_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Blocks, weights of each, and of embedding and LM head."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    block = 2 * hidden * head * (heads + kv_heads) + 3 * hidden * config["intermediate_size"]
    ends = 1 if config.get("tie_word_embeddings") else 2
    return config["num_hidden_layers"], block, ends * config["vocab_size"] * hidden
