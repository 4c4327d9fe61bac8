"""config.json: what of it we compute with is checked once, as it is read. transformers judges the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.families import FAMILIES, attention_sizes, family_of

_NEEDED = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
)
_MOST_BLOCKS = 10_000  # each has names and entries of its own in all that follows


def read_config(path: Path) -> dict[str, Any]:
    """The keys and values of a model's config.json.

    Raises:
        UserError: it is missing, not JSON, short of a size, has one that no model has, or is of KV that is not plain.

    """
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no config.json; give a HF folder") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON; get the model again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object; get the model again")
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise UserError(f'{path}: key architectures is {named!r}; it must be a list such as ["LlamaForCausalLM"]')
    needed = [*_NEEDED, _mlp_key(config)]
    missing = [key for key in needed if config.get(key) is None]
    if named and family_of(config, str(path.parent)).blocks is None and missing:
        raise UserError(
            f"{path.parent}: architecture {named[0]} is not supported: its config.json has no {missing[0]}, without "
            f"which the shape of its KV is not known; blocks can be cut of {', '.join(FAMILIES)}"
        )
    if missing:
        raise UserError(f"{path}: key {missing[0]} is missing; get the model again")
    for key in (*needed, "num_key_value_heads", "head_dim"):
        if config.get(key) is not None:
            _check_positive(key, config[key], path)
    _check_positive("head_dim", attention_sizes(config)[2], path)
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"{path}: key {key} is {config[key]!r}; it must be an object of keys and values, or null")
    return config


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE as one dict: transformers 5 writes `rope_parameters`, earlier ones `rope_theta` and `rope_scaling`."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    return rope


def _mlp_key(config: dict[str, Any]) -> str:
    """The key of an MLP's width: of a model whose blocks all have experts (Qwen3.5-MoE), that of an expert's may do."""
    alone = config.get("moe_intermediate_size") is not None and not config.get("first_k_dense_replace")
    return "moe_intermediate_size" if alone and config.get("intermediate_size") is None else "intermediate_size"


def _check_positive(key: str, value: object, path: Path) -> None:
    if type(value) is not int or value < 1:
        raise UserError(f"{path}: key {key} is {value!r}; it must be a whole number of at least 1")
    if key == "num_hidden_layers" and value > _MOST_BLOCKS:
        raise UserError(f"{path}: key {key} is {value}, more than any model has; get the model again")
