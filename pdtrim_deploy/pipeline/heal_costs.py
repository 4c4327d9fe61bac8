"""Operations of healing without gradients and of the choice of KV, and memory of what is fitted. No torch."""

from __future__ import annotations

from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.pipeline.heal import needed
from pdtrim_deploy.pruning.cost import fitted_bytes
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.kv import FIXED_KV, KVSection
from pdtrim_deploy.recipe.kv_cost import BATCH

_CONTEXTS = 2  # around which effects are measured, likely: of dense, and of the first plan


def fit_bytes(recipe: Recipe, sizes: ModelSizes) -> int:
    """Of one block's normal equations and of the new maps, if blocks are fitted."""
    refits = needed(recipe) and recipe.healing.compensation == "least-squares"
    return fitted_bytes(sizes, recipe.pruning, refits) if refits or recipe.pruning.distil else 0


def heal_flops(recipe: Recipe, sizes: ModelSizes) -> float:
    """Likely operations of compensation and KV-only blocks (`training_costs`: of training)."""
    pruning, healing = recipe.pruning, recipe.healing
    tokens, flops = healing.sequences * healing.length, 0.0
    stages = ((pruning.prefill_blocks, pruning.prefill_loses), (pruning.decode_blocks, pruning.decode_loses))
    for removed, lost in stages:
        if lost and healing.compensation != "none":
            flops += 2 * sizes.active * tokens * (sizes.blocks + 3 * (sizes.blocks - removed))
            flops += sizes.fit_flops * tokens * lost if healing.compensation == "least-squares" else 0
    if healing.kv_only_blocks:  # the pair without each candidate, from it to the end
        flops += sizes.active * tokens * sizes.blocks * (sizes.blocks + 1)
    return flops


def kv_flops(kv: KVSection, sizes: ModelSizes, states: int) -> tuple[float, float]:
    """Likely operations of choosing KV, and passes over all blocks.

    Args:
        kv: the section on KV.
        sizes: of the model.
        states: bytes of hidden states that go through the model side by side.

    """
    blocks, batches = sizes.blocks, -(-kv.sequences // BATCH)
    flops = passes = 0.0
    if kv.measures_offsets:
        flops += 2 * sizes.active * blocks * kv.sequences * kv.prompt_tokens
        passes += kv.sequences
    if kv.method in FIXED_KV or kv.method == "random":
        return flops, passes
    lengths = len(kv.prompts)
    prompts, tokens = kv.sequences * sum(kv.prompts), lengths * kv.sequences * (kv.continuation_tokens - 1)
    batches *= lengths
    flops += 2 * sizes.active * blocks * (prompts + 2 * tokens)
    passes += 3 * batches
    if kv.method in ("budget", "measured-harm"):
        rows = len(kv.sparse_choices) if kv.method == "budget" else 1
        options = rows + (len({"native", *kv.wire_choices}) - 1 if kv.method == "budget" else 1)
        flops += _CONTEXTS * 2 * sizes.active * tokens * options * blocks * (blocks + 1) / 2
        state = min(BATCH, kv.sequences) * (kv.continuation_tokens - 1) * sizes.hidden * 4
        layers = max(1, states // state // options)  # whose options go side by side
        passes += _CONTEXTS * batches * sum(blocks - first for first in range(0, blocks, layers)) / blocks
    return flops, passes
