"""What ranking experts will cost, before a weight is read: from config.json and the recipe's numbers. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdtrim_deploy.models.families import known_family
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.pruning.cost import block_bytes, streamed
from pdtrim_deploy.recipe import CalibrationSection
from pdtrim_deploy.recipe.pruning import PruningSection

_FLOAT = 4  # experts are ranked in float32


@dataclass(frozen=True)
class ExpertCost:
    """Of both stages.

    Attributes:
        flops: of the forward passes; each expert that is ranked runs once more for the norm of its output.
        reads: bytes of blocks read from the checkpoint, where not all are in memory.
        memory: bytes of weights at most: the model, or the blocks in memory, and the experts that prefill keeps.

    """

    flops: float
    reads: int
    memory: int


def expert_cost(config: Mapping[str, Any], pruning: PruningSection, text: CalibrationSection) -> ExpertCost | None:
    """`config` is config.json's; None where experts are kept without reading text, or all are kept."""
    section = pruning.experts
    family = known_family((config.get("architectures") or [""])[0])
    if section is None or section.method == "random" or (shape := family.expert_shape(config)) is None:
        return None
    sizes = ModelSizes.of(config)
    experts = sizes.block - sizes.active  # the other count - top_k
    each = experts // max(1, shape.count - shape.top_k)
    ranks_prefill, ranks_decode = (section.count(stage, shape.count) < shape.count for stage in STAGES)
    if not (ranks_prefill or ranks_decode):
        return None
    together = section.shared or not (ranks_prefill and ranks_decode)
    prefills, decodes = (1 if together else 2), int(ranks_decode)
    prefill_blocks, decode_blocks = sizes.blocks - pruning.prefill_blocks, sizes.blocks - pruning.decode_blocks
    prompt, more = text.prompt, text.length - text.prompt
    runs = prefills * prefill_blocks * prompt + decodes * decode_blocks * more
    ranked = ranks_prefill * prefill_blocks * prompt + decodes * decode_blocks * more
    pruned_prefill = section.count("prefill", shape.count) if ranks_prefill and ranks_decode else 0
    kept = 0 if streamed(pruning, sizes.blocks) else pruned_prefill * each * prefill_blocks
    return ExpertCost(
        flops=2.0 * text.sequences * (sizes.active * runs + shape.top_k * each * ranked),
        reads=(prefills * prefill_blocks + decodes * decode_blocks) * block_bytes(config)
        if streamed(pruning, sizes.blocks)
        else 0,
        memory=_FLOAT * (sizes.ends + min(sizes.blocks, pruning.blocks_in_memory or sizes.blocks) * sizes.block + kept),
    )
