"""The model families whose blocks we know how to cut; any other architecture is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pdtrim_deploy.errors import UserError

Shapes = dict[str, tuple[str, ...]]
"""Tensors of a block, and which sizes their axes have: those of `_sizes`."""

_BLOCK: Shapes = {
    "input_layernorm.weight": ("hidden",),
    "self_attn.q_proj.weight": ("q", "hidden"),
    "self_attn.k_proj.weight": ("kv", "hidden"),
    "self_attn.v_proj.weight": ("kv", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "q"),
    "post_attention_layernorm.weight": ("hidden",),
    "mlp.gate_proj.weight": ("intermediate", "hidden"),
    "mlp.up_proj.weight": ("intermediate", "hidden"),
    "mlp.down_proj.weight": ("hidden", "intermediate"),
}


@dataclass(frozen=True)
class Family:
    """A decoder-only architecture; all share the names `model.layers.{i}.*`, `model.norm` and `lm_head`."""

    architecture: str
    model_type: str
    extra: Shapes = field(default_factory=dict)

    def required_tensors(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Names and shapes that a whole checkpoint of this family and config must hold."""
        size = _sizes(config)
        rows = (size["vocab"], size["hidden"])
        ends = {"model.embed_tokens.weight": rows, "model.norm.weight": rows[1:]}
        if not config.get("tie_word_embeddings", False):
            ends["lm_head.weight"] = rows
        block = {name: tuple(size[axis] for axis in axes) for name, axes in (_BLOCK | self.extra).items()}
        blocks = range(config["num_hidden_layers"])
        return ends | {f"model.layers.{i}.{name}": shape for i in blocks for name, shape in block.items()}

    @property
    def model_class(self) -> Any:
        """The transformers class of this name: taken directly, so a checkpoint's `auto_map` is never looked at."""
        import transformers

        return getattr(transformers, self.architecture)


def attention_sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Heads, KV heads and the size of a head; config.json may leave the latter two out."""
    heads = config["num_attention_heads"]
    return heads, config.get("num_key_value_heads") or heads, config.get("head_dim") or config["hidden_size"] // heads


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    heads, kv_heads, head = attention_sizes(config)
    widths = {"q": heads * head, "kv": kv_heads * head, "head": head}
    return widths | {key: config[f"{key}_size"] for key in ("hidden", "intermediate", "vocab")}


_QKV_BIAS: Shapes = {f"self_attn.{name}_proj.bias": (axis,) for name, axis in (("q", "q"), ("k", "kv"), ("v", "kv"))}
_QK_NORM: Shapes = {f"self_attn.{name}_norm.weight": ("head",) for name in "qk"}

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama"),
        Family("MistralForCausalLM", "mistral"),
        Family("Qwen2ForCausalLM", "qwen2", _QKV_BIAS),
        Family("Qwen3ForCausalLM", "qwen3", _QK_NORM),
    )
}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family that config.json names; UserError for any other architecture, with those supported."""
    named = config.get("architectures") or [f"none (model_type {config.get('model_type')!r})"]
    family = FAMILIES.get(named[0])
    if family is None:
        raise UserError(f"{where}: architecture {named[0]} is not supported; those that are: {', '.join(FAMILIES)}")
    return family
