"""What sliding windows save of prompt KV, in a sentence, and what SGLang saves of it by itself."""

from __future__ import annotations

from pdtrim_deploy.models.families import known_family
from pdtrim_deploy.plan import PDPlan


def windows_sentence(plan: PDPlan, prompt_tokens: int) -> str | None:
    """How many layers send a window, and what SGLang would send of the unpruned model; None without windows."""
    windows, family = plan.model.windows, known_family(plan.model.architecture)
    if not windows:
        return None
    tokens = " or ".join(map(str, sorted({window for window in windows if window is not None})))
    reads, every = (plan.dense_bytes(prompt_tokens, every_row=every_row) for every_row in (False, True))
    sentence = (
        f"{sum(window is not None for window in windows)} of {len(windows)} blocks attend to the last {tokens} tokens, "
        f"and decode reads a row less of the prompt: dense counts those rows, {reads:,} bytes at {prompt_tokens} tokens"
    )
    if family.windows is not None and family.windows.pool:
        return f"{sentence}, as SGLang 0.5.23 sends of {family.architecture}; all rows are {every:,}"
    return (
        f"{sentence}; SGLang 0.5.23 has no pool of windows for {plan.model.architecture} and by itself sends all rows, "
        f"{every:,} bytes, {every / plan.payload_bytes(prompt_tokens):.2f}x the plan's"
    )
