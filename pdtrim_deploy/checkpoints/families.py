"""The model families whose blocks we know how to cut; any other architecture is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdtrim_deploy.errors import UserError

_BLOCK = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)


@dataclass(frozen=True)
class Family:
    """A decoder-only architecture; all share the names `model.layers.{i}.*`, `model.norm` and `lm_head`."""

    architecture: str
    model_type: str
    extra: tuple[str, ...] = ()

    def required_tensors(self, config: Mapping[str, Any]) -> set[str]:
        """Names that a whole checkpoint of this family and config must hold."""
        names = {"model.embed_tokens.weight", "model.norm.weight"}
        if not config.get("tie_word_embeddings", False):
            names.add("lm_head.weight")
        blocks = range(config["num_hidden_layers"])
        return names | {f"model.layers.{i}.{name}" for i in blocks for name in _BLOCK + self.extra}

    @property
    def model_class(self) -> Any:
        """The transformers class of this name: taken directly, so a checkpoint's `auto_map` is never looked at."""
        import transformers

        return getattr(transformers, self.architecture)


_QKV_BIAS = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
_QK_NORM = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")

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
