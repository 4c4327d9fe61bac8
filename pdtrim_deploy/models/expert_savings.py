"""What expert pruning saves, in bytes and in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pdtrim_deploy.models.weights import one_expert
from pdtrim_deploy.plan import STAGES, PDPlan, Stage
from pdtrim_deploy.plan.wire import ITEM_BYTES


def expert_bytes_saved(config: Mapping[str, Any], plan: PDPlan, stage: Stage, *, quantised: bool) -> int:
    """Weights of experts that the stage does not keep, in the plan's dtype; `quantised`: as codes of one byte.

    `config` is the model's or a stage's.
    """
    kept = plan.kept_experts(stage)
    if plan.experts is None or not kept:
        return 0
    gone = plan.experts.shape.count - plan.experts.count(stage)
    expert = one_expert(config, config["num_hidden_layers"] - 1)
    return len(kept) * gone * expert * (1 if quantised else ITEM_BYTES[plan.model.kv_dtype])


def experts_sentence(plan: PDPlan, config: Mapping[str, Any], *, quantised: bool) -> str | None:
    """How many experts each stage's blocks keep, and the weights saved; None where both keep all.

    `config` is the model's config.json, or a stage's; `quantised`: its weights are codes of one byte.
    """
    if plan.experts is None:
        return None
    total, top_k = plan.experts.shape.count, plan.experts.shape.top_k
    prefill, decode = plan.kept_experts("prefill"), plan.kept_experts("decode")
    parts = []
    for stage in STAGES:
        kept, saved = plan.experts.count(stage), expert_bytes_saved(config, plan, stage, quantised=quantised)
        parts.append(f"{kept} of {total} in {stage} ({saved / 1e9:,.2f} GB of weights fewer)")
    sentence = f"experts of each block: {', '.join(parts)}; a token still goes to {top_k}, so that it computes as much"
    both = [len({*prefill[block]} & {*decode[block]}) for block in decode if block in prefill]
    return sentence + (f"; the stages share {sum(both) / len(both):.1f} on average" if both else "")
