"""Operations of healing without gradients, and memory of what is fitted. No torch."""

from __future__ import annotations

from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.pipeline.heal import needed
from pdtrim_deploy.pruning.cost import fitted_bytes
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.healing import RANKED


def fit_bytes(recipe: Recipe, sizes: ModelSizes) -> int:
    """Of one block's normal equations and of the new maps, if blocks are fitted."""
    refits = needed(recipe) and recipe.healing.compensation == "least-squares"
    return fitted_bytes(sizes, recipe.pruning, refits) if refits or recipe.pruning.distil else 0


def heal_flops(recipe: Recipe, sizes: ModelSizes) -> float:
    """Likely operations of compensation and KV-only blocks (`training_costs`: of training)."""
    pruning, healing = recipe.pruning, recipe.healing
    tokens, flops = healing.fitted * healing.length, 0.0
    prefill_loses = pruning.prefill_loses or (0 if healing.kv_only_tail else healing.kv_only_blocks)
    stages = [(pruning.prefill_blocks, prefill_loses), (pruning.decode_blocks, pruning.decode_loses)]
    for removed, lost in stages[:1] if recipe.stages == "unified" else stages:
        if lost and healing.compensation != "none":
            flops += 2 * sizes.active * tokens * (sizes.blocks + 3 * (sizes.blocks - removed))
            flops += sizes.fit_flops * tokens * lost if healing.compensation == "least-squares" else 0
    if healing.prompt_share and pruning.decode_loses:  # decode reads the prompts too
        flops += 2 * sizes.active * tokens * (sizes.blocks - pruning.decode_blocks)
    if healing.kv_only_blocks:  # without a tail, the pair without each candidate, from it to the end
        ranked = 0 if healing.kv_only_tail else min(RANKED, healing.fitted) * healing.length
        flops += sizes.active * ranked * sizes.blocks * (sizes.blocks + 1)
        fits = 1 if healing.compensation == "none" or healing.kv_only_tail else 2
        flops += fits * 4 * sizes.active * tokens * sizes.blocks  # of their K and V, behind both models
    if recipe.target is not None:  # K and V of blocks that it may leave for these alone, behind both models
        text = tokens if healing.enabled else recipe.calibration.sequences * recipe.calibration.length
        flops += 4 * sizes.active * text * sizes.blocks
    return flops
