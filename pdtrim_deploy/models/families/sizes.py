"""Sizes of tensors by the names that family files give their axes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.families.latents import latent_sizes


def attention_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Heads, KV heads and the size of a head; config.json may leave the latter two out.

    Of latents there is one a token, in the place of KV heads, and its size is the head's.
    """
    if (latents := latent_sizes(config)) is not None:
        return config["num_attention_heads"], 1, latents.latent
    heads = config["num_attention_heads"]
    return heads, config.get("num_key_value_heads") or heads, config.get("head_dim") or config["hidden_size"] // heads


def mlp_width(config: Mapping[str, Any]) -> int:
    """Width of an MLP between its maps; of models whose blocks all have experts and no such key, what a token meets."""
    if config.get("intermediate_size") is not None:
        return int(config["intermediate_size"])
    width, top_k = config["moe_intermediate_size"], config.get("num_experts_per_tok") or 1
    return int(width * top_k + (config.get("shared_expert_intermediate_size") or 0))


def axis_sizes(config: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, int]:
    """Sizes by name: those that every family has, and `named` (name -> key of config.json)."""
    heads, kv_heads, head = attention_sizes(config)
    widths = {"q": heads * head, "kv": kv_heads * head, "head": head}
    widths |= {"hidden": config["hidden_size"], "intermediate": mlp_width(config), "vocab": config["vocab_size"]}
    return widths | {name: count_of(config, key) for name, key in named.items()}


def count_of(config: Mapping[str, Any], key: str) -> int:
    """A count by its key in config.json, or by one of several: `num_experts|num_local_experts`.

    Raises:
        UserError: it is missing or no whole number.

    """
    value = next((config[name] for name in key.split("|") if config.get(name) is not None), None)
    if type(value) is not int or value < 0:
        raise UserError(
            f"config.json: key {key.partition('|')[0]} is {value!r}; it must be a whole number of at least 0"
        )
    return value


def axis_terms(axis: str) -> list[list[str]]:
    """`q+2*kv` as a sum of products: `[["q"], ["2", "kv"]]`."""
    return [[factor.strip() for factor in term.split("*")] for term in axis.split("+")]


def axis_size(axis: str, sizes: Mapping[str, int]) -> int:
    """The size of an axis such as `hidden`, `q+2*kv` or `shared*expert`."""
    return sum(prod(int(f) if f.isdecimal() else sizes[f] for f in term) for term in axis_terms(axis))
