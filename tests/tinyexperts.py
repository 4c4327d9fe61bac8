"""Tiny mixtures of experts of which it is known who uses which expert, and which experts are of no use."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pdtrim_deploy.models import FAMILIES
from pdtrim_deploy.models.loading import load_model

MOE = tuple(name for name, family in FAMILIES.items() if family.blocks.experts)
GATE = dict.fromkeys(MOE, "mlp.gate") | {"GptOssForCausalLM": "mlp.router"}
"""transformers' name of the router."""
USED = {"prompt": (0, 2), "answer": (4, 6)}
"""By kind of token: the experts that it needs. All its tokens are sent to `POPULAR` too, which puts out nothing."""
POPULAR = {"prompt": 1, "answer": 5}


def settings(architecture: str, experts: int = 8) -> dict[str, object]:
    """Config keys of a model with so many experts, two of which each token is sent to."""
    keys = {"Qwen3MoeForCausalLM": "num_experts", "Glm4MoeForCausalLM": "n_routed_experts"}
    return {keys.get(architecture, "num_local_experts"): experts}


@torch.no_grad()
def divide(folder: Path) -> None:
    """Change the tiny model in `folder`: tokens of a kind use experts of their own.

    Embeddings are the sum of two directions: one by kind of token (`tokens`), one by half of a kind; they outweigh
    whatever blocks add. A router's rows are such sums too, so that each half has its expert, and each kind an expert
    that all its tokens like as well, whose output is zero.
    """
    model = load_model(folder)
    by_kind, by_half = torch.linalg.qr(torch.randn(64, 2, generator=torch.Generator().manual_seed(5)))[0].T
    kind, half = (torch.where(bits.bool(), -1.0, 1.0)[:, None] for bits in _bits(512))
    model.model.embed_tokens.weight.add_(20 * (kind * by_kind + half * by_half))
    rows = torch.zeros(8, 64)
    for first, sign in ((0, 1), (4, -1)):
        rows[first] = sign * by_kind + by_half
        rows[first + 1] = 2 * sign * by_kind
        rows[first + 2] = sign * by_kind - by_half
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.05)
        layer.post_attention_layernorm.weight.fill_(1.0)
        for name, parameter in layer.mlp.named_parameters():
            if "down_proj" in name:
                parameter.mul_(0.1)
        if hasattr(layer.mlp, "experts"):
            gate = layer.get_submodule(GATE[type(model).__name__])
            gate.weight.copy_(rows)
            for name, parameter in layer.mlp.experts.named_parameters():
                if name.startswith("down_proj"):
                    parameter[[POPULAR["prompt"], POPULAR["answer"]]] = 0.0
            for name, parameter in (*gate.named_parameters(), *gate.named_buffers()):
                if name.endswith("bias"):  # or e_score_correction_bias
                    parameter.zero_()
    model.save_pretrained(folder)


def tokens(kind: str, sequences: int, length: int, seed: int = 0) -> Tensor:
    """int64 `[sequences, length]` of a kind's tokens, both halves."""
    draw = torch.randint(1, 60, (sequences, length), generator=torch.Generator().manual_seed(seed))
    half = torch.arange(length) % 2
    return 4 * draw + 2 * half + (kind == "answer")


def conversation(sequences: int = 4, length: int = 24) -> Tensor:
    """int64 `[sequences, length]`: half a prompt, half an answer."""
    return torch.cat([tokens(kind, sequences, length // 2, seed) for seed, kind in enumerate(USED)], dim=1)


def _bits(vocabulary: int) -> tuple[Tensor, Tensor]:
    ids = torch.arange(vocabulary)
    return ids % 2, ids // 2 % 2
