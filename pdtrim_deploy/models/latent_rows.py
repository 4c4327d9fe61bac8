"""What a plan of latents (MLA) sends, in a sentence."""

from __future__ import annotations

from pdtrim_deploy.plan import PDPlan


def latents_sentence(plan: PDPlan) -> str | None:
    """How large a token's row is, and how often it travels; None of a model with K and V."""
    model = plan.model
    if model.rope_dim is None:
        return None
    return (
        f"a token's KV in a layer is a latent of {model.head_dim} numbers and a rope key of {model.rope_dim}, the same "
        "on every rank of tensor parallelism: a decode worker of N attention ranks is sent N times these bytes"
    )
