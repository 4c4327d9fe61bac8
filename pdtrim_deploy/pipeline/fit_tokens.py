"""Whether the text of a recipe is long enough for its least squares, in one sentence. No torch."""

from __future__ import annotations

from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.pipeline.heal import needed
from pdtrim_deploy.recipe import Recipe

TOKENS_A_FEATURE = 10  # a test holds it to `pruning.low_rank`'s


def fit_sentence(recipe: Recipe, sizes: ModelSizes) -> str | None:
    """Tokens a feature of the stage with fewest, where these are too few; None where they suffice or none is fitted."""
    healing, pruning = recipe.healing, recipe.pruning
    if not needed(recipe) or healing.compensation != "least-squares":
        return None
    behind_prompts = recipe.stages == "pair" and bool(pruning.decode_loses)
    tokens = healing.sequences * (healing.length // 2 if behind_prompts else healing.length)
    if tokens >= TOKENS_A_FEATURE * sizes.inner:
        return None
    enough = -(-TOKENS_A_FEATURE * sizes.inner * healing.sequences // tokens)
    done = (
        "so each map is changed by a diagonal and a low rank alone"
        if healing.fit == "auto"
        else "so it may fit this text and lose on other text; or set healing.fit: auto"
    )
    who = "decode's " if behind_prompts else ""
    return (
        f"{who}least squares have {tokens:,} tokens for {sizes.inner:,} features of a map, {tokens / sizes.inner:.1f} "
        f"a feature where {TOKENS_A_FEATURE} are advised (healing.sequences of {enough:,}), {done}"
    )
