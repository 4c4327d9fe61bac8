"""What a plan sends of a model with linear attention, in a sentence: states apart from KV."""

from __future__ import annotations

from pdtrim_deploy.plan import PDPlan


def states_sentence(plan: PDPlan, prompt_tokens: int) -> str | None:
    """How many blocks keep a state, and what share of the bytes that is; None of a model whose blocks all have KV."""
    model = plan.model
    if model.states is None:
        return None
    states, kv, total = model.state_bytes, plan.kv_bytes(prompt_tokens), plan.payload_bytes(prompt_tokens)
    dense = plan.dense_bytes(prompt_tokens) - states
    return (
        f"{len(model.states.blocks)} of {model.num_blocks} blocks have linear attention and keep a state in the place "
        f"of KV, which travels as it is, {states:,} bytes a request whatever its length: {states / total:.0%} of the "
        f"planned bytes at {prompt_tokens} tokens. Dense bytes and reductions count it; of KV alone {kv:,} of "
        f"{dense:,} bytes travel, {dense / kv:.2f}x less"
    )
