"""Whether the text of a recipe is long enough for its least squares, in one sentence. No torch."""

from __future__ import annotations

import math

from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.pipeline.heal import needed
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.healing import TOKENS_A_FEATURE


def fit_sentence(recipe: Recipe, sizes: ModelSizes) -> str | None:
    """Tokens a feature of the stage with fewest, where these are too few; None where they suffice or none is fitted.

    They count as in `least_squares.Ridge`: of decode those behind the prompts, and of each prompt's its `prompt_share`.
    """
    healing, pruning, target = recipe.healing, recipe.pruning, recipe.target
    if not needed(recipe) or healing.compensation != "least-squares":
        return None
    decode_loses = pruning.decode_loses or (target is not None and target.stages[1])
    behind_prompts = recipe.stages == "pair" and bool(decode_loses)
    prompt = healing.length // 2 if behind_prompts else 0
    each = healing.length - prompt + healing.prompt_share * prompt
    tokens = healing.fitted * each
    if tokens >= TOKENS_A_FEATURE * sizes.inner:
        return None
    enough = math.ceil(TOKENS_A_FEATURE * sizes.inner / each)
    done = (
        "so each map is changed by a diagonal and a low rank alone"
        if healing.fit == "auto"
        else "so it may fit this text and lose on other text; or set healing.fit: auto"
    )
    counted = f" (a prompt's count {healing.prompt_share:g} each)" if prompt and healing.prompt_share else ""
    name = "sequences" if healing.fit_sequences is None else "fit_sequences"
    who = "decode's " if behind_prompts else ""
    return (
        f"{who}least squares have {tokens:,.0f} tokens{counted} for {sizes.inner:,} features of a map, "
        f"{tokens / sizes.inner:.1f} a feature where {TOKENS_A_FEATURE} are advised "
        f"(healing.{name} of {enough:,}), {done}"
    )
