"""How many weights a model of a config has, and its sizes: the one place that reads them from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from pdtrim_deploy.models.families import attention_sizes, known_family
from pdtrim_deploy.models.families.blocks import EXPERT
from pdtrim_deploy.models.families.latents import attention_tensors, latent_sizes
from pdtrim_deploy.models.families.sizes import mlp_width
from pdtrim_deploy.plan.wire import ITEM_BYTES

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelSizes:
    """Of a Llama-like model, in weights; norms and biases are left out: less than one per mille.

    Attributes:
        blocks: how many there are.
        hidden, inner, vocabulary: of a hidden state, of the MLP between its maps, of the logits.
        kv_width: of K, and of V, of one token in one block; of latents half of what is kept.
        block: weights of the last block, the largest where the first ones have no experts.
        active: of these, what one token is multiplied with: of experts, as many as it is sent to.
        expert_width, expert_tokens: of the MLP that a token meets, or of one expert, the width between its maps and the
            share of tokens that come to it.
        ends: weights of embedding and LM head.
        total: weights of the model.

    """

    blocks: int
    hidden: int
    inner: int
    vocabulary: int
    kv_width: int
    block: int
    active: int
    expert_width: int
    expert_tokens: float
    ends: int
    total: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelSizes:
        """`config` is config.json's."""
        hidden, inner, vocabulary = config["hidden_size"], mlp_width(config), config["vocab_size"]
        blocks, (attention, kv_width) = config["num_hidden_layers"], _attention(config)
        attentions = _attentions(config, attention)
        mlps = _mlps(config)
        experts = _experts(config)
        active = attention + mlps[-1] - (experts.each * (experts.count - experts.top_k) if experts else 0)
        tied = known_family((config.get("architectures") or [""])[0]).tied(config)
        ends = (1 if tied else 2) * vocabulary * hidden
        return cls(
            blocks=blocks,
            hidden=hidden,
            inner=inner,
            vocabulary=vocabulary,
            kv_width=kv_width,
            block=attention + mlps[-1],
            active=active,
            expert_width=experts.each // (3 * hidden) if experts else inner,
            expert_tokens=experts.top_k / experts.count if experts else 1.0,
            ends=ends,
            total=attentions + sum(mlps) + ends,
        )

    @property
    def has_experts(self) -> bool:
        """Whether a token meets some of the last block's weights only."""
        return self.active < self.block

    @property
    def kv(self) -> int:
        """Weights of one block's K and V projections: all that is computed of a block that runs for its KV alone."""
        return 2 * self.hidden * self.kv_width

    @property
    def fit_bytes(self) -> int:
        """Bytes of one block's normal equations (`least_squares.Ridge`), in float64.

        There is one set for fitting and one for choosing the penalty, and two more squares while it is solved.
        """
        return 8 * (4 * self.inner * self.inner + 3 * self.inner * self.hidden)

    @property
    def fit_flops(self) -> int:
        """Operations a token of summing up one block's normal equations."""
        return 2 * self.inner * (self.inner + self.hidden)


def stored_bytes(config: Mapping[str, Any], dtype: str, lost: int = 0) -> int:
    """Of a checkpoint written in `dtype` without so many blocks, and of a worker that serves it on a GPU.

    Of FP8 weights a block's maps are codes of a byte each, and scales, below 1 %.
    """
    sizes, item = ModelSizes.of(config), ITEM_BYTES[dtype]  # type: ignore[index]
    of_block = 1 if config.get("quantization_config") else item
    return sizes.ends * item + (sizes.total - sizes.ends - lost * sizes.block) * of_block


def _attention(config: Mapping[str, Any]) -> tuple[int, int]:
    """Weights of a block's attention, and `kv_width`."""
    heads, kv_heads, head = attention_sizes(config)
    if (latents := latent_sizes(config)) is None:
        gates = heads if known_family((config.get("architectures") or [""])[0]).linear_attention else 0  # of its output
        return config["hidden_size"] * head * (2 * (heads + kv_heads) + gates), kv_heads * head
    weights = sum(prod(shape) for shape in attention_tensors(config).values() if len(shape) > 1)
    return weights, (latents.latent + latents.rope) // 2


def _attentions(config: Mapping[str, Any], attention: int) -> int:
    """Weights of all blocks' attentions, of which one that attends to all tokens has so many."""
    blocks = config["num_hidden_layers"]
    linear = known_family((config.get("architectures") or [""])[0]).linear_attention
    if linear is None:
        return int(blocks * attention)
    others = len(linear.states(config).blocks)
    return int((blocks - others) * attention + others * linear.linear_weights(config))


def _mlps(config: Mapping[str, Any]) -> list[int]:
    """Weights of each block's MLP: those of one kind, dense or of experts, have equally many."""
    family = known_family((config.get("architectures") or [""])[0])
    first, of_kind, weights = config.get("first_k_dense_replace") or 0, dict[tuple[bool, bool], int](), list[int]()
    for block in range(config["num_hidden_layers"]):
        kind = family.is_dense(config, block), block < first
        if kind not in of_kind:
            of_kind[kind] = _mlp(config, block)
        weights.append(of_kind[kind])
    return weights


def _mlp(config: Mapping[str, Any], block: int) -> int:
    """Weights of a block's MLP, or of all its experts and their router."""
    hidden, family = config["hidden_size"], known_family((config.get("architectures") or [""])[0])
    if family.blocks is None:  # by the names that most have
        experts = _experts_by_name(config)
        if experts is None or block < (config.get("first_k_dense_replace") or 0):
            return int(3 * hidden * mlp_width(config))
        shared = experts.each * (config.get("n_shared_experts") or 0)
        shared += 3 * hidden * (config.get("shared_expert_intermediate_size") or 0)
        return experts.each * experts.count + shared + hidden * experts.count
    tensors = family.block_tensors(config, block).items()
    return sum(prod(shape) for name, shape in tensors if not name.startswith("self_attn.") and len(shape) > 1)


@dataclass(frozen=True)
class _Experts:
    """Of a block: how many there are, how many a token is sent to, and weights of each."""

    count: int
    top_k: int
    each: int


def _experts(config: Mapping[str, Any]) -> _Experts | None:
    shape = known_family((config.get("architectures") or [""])[0]).expert_shape(config)
    if shape is None:
        return _experts_by_name(config)
    return _Experts(shape.count, shape.top_k, one_expert(config, config["num_hidden_layers"] - 1))


def _experts_by_name(config: Mapping[str, Any]) -> _Experts | None:
    """Of a family whose blocks are not known."""
    if known_family((config.get("architectures") or [""])[0]).blocks is not None:
        return None
    count = next((config[key] for key in _EXPERTS if config.get(key)), 1)
    if count == 1:
        return None
    width = config.get("moe_intermediate_size") or mlp_width(config)
    return _Experts(count, config.get("num_experts_per_tok") or count, 3 * config["hidden_size"] * width)


def one_expert(config: Mapping[str, Any], block: int) -> int:
    """Weights of one expert."""
    family = known_family((config.get("architectures") or [""])[0])
    experts = family.blocks.experts if family.blocks else None
    parts = {name for names in experts.stacked.values() for name in names} if experts else set()
    tensors = family.block_tensors(config, block)
    shapes = [tensors[name.replace(EXPERT, "0")][EXPERT not in name :] for name in parts]
    return sum(map(prod, shapes))
