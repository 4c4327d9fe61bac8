"""Whether a recipe fits a model's size, and the processes that are to build it. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.kv import FIXED_KV
from pdtrim_deploy.recipe.pruning_methods import EVALUATED


def check_fits(recipe: Recipe, blocks: int, positions: int) -> None:
    """Refuse a recipe that asks for more than a model of `blocks` blocks has, or longer text than it takes."""
    removed, sparse, alone = recipe.pruning.decode_blocks, recipe.kv.sparse_layers, recipe.healing.kv_only_blocks
    if removed >= blocks:
        raise UserError(
            f"recipe {recipe.name}: pruning.decode_blocks is {removed}; allowed: at most {blocks - 1}, "
            f"the model has {blocks} blocks"
        )
    if (sublayers := recipe.pruning.decode_sublayers) > blocks - removed:
        raise UserError(
            f"recipe {recipe.name}: pruning.decode_attentions and decode_mlps are {sublayers}; allowed: at most "
            f"{blocks - removed}, the blocks that decode keeps, each of which can go without one sublayer"
        )
    attentions = blocks - removed - recipe.pruning.decode_attentions
    if not attentions:
        raise UserError(
            f"recipe {recipe.name}: pruning.decode_attentions is {blocks - removed}; allowed: at most "
            f"{blocks - removed - 1}, since decode sees the prompt by its attentions alone"
        )
    if sparse > attentions:
        layers = "layers with attention" if recipe.pruning.decode_attentions else "layers"
        raise UserError(
            f"recipe {recipe.name}: kv.sparse_layers is {sparse}; allowed: at most {attentions}, "
            f"the {layers} that decode keeps"
        )
    whole, which = attentions - recipe.pruning.prefill_mlps, "the blocks whose KV decode reads"
    if recipe.healing.kv_only_tail:
        pruning = recipe.pruning
        whole = blocks - pruning.prefill_blocks - max(1, pruning.prefill_sublayers)
        which = "the blocks that prefill runs whole, behind its first"
    if alone > whole:
        raise UserError(f"recipe {recipe.name}: healing.kv_only_blocks is {alone}; allowed: at most {whole}, {which}")
    for option, tokens in _lengths(recipe):
        if tokens > positions:
            raise UserError(
                f"recipe {recipe.name}: {option} is {tokens} tokens; allowed: at most {positions}, "
                f"the model's max_position_embeddings"
            )


def _lengths(recipe: Recipe) -> Iterator[tuple[str, int]]:
    """What each part of a build lets the model read at a time."""
    text, kv, healing = recipe.evaluation, recipe.kv, recipe.healing
    fits = recipe.target is not None and not healing.enabled  # K and V alone, on the text of the calibration
    if recipe.pruning.decode_loses or recipe.pruning.experts or fits:
        yield "calibration.length", recipe.calibration.length
    if healing.enabled:
        yield "healing.length", healing.length
    if kv.method not in FIXED_KV or recipe.target is not None:
        name = "longer_prompts" if kv.longer_prompts else "prompt_tokens"
        yield f"kv.{name} + kv.continuation_tokens", kv.prompts[-1] + kv.continuation_tokens
    if healing.kv_steps:
        yield "kv.prompt_tokens + half of healing.length", kv.prompt_tokens + healing.length // 2
    yield "evaluation.prompt_tokens + evaluation.continuation_tokens", text.prompt_tokens + text.continuation_tokens


def check_shared(recipe: Recipe) -> None:
    """Refuse for Ray's workers what bounds the memory of one process, and methods that ask nobody else."""
    if recipe.target is not None:
        raise UserError(f"recipe {recipe.name}: target is answered by one process alone; build without --workers")
    if recipe.pruning.decode_loses and recipe.pruning.method not in EVALUATED:
        raise UserError(
            f"recipe {recipe.name}: pruning.method is {recipe.pruning.method}, which one process searches alone; "
            f"build without --workers or choose one of {', '.join(EVALUATED)}"
        )
    for name, what in (
        ("blocks_in_memory", "holds the whole model"),
        ("disk_mb", "keeps hidden states in memory alone"),
    ):
        if getattr(recipe.pruning, name):
            raise UserError(
                f"recipe {recipe.name}: pruning.{name} is for a search in one process, but each worker {what}; "
                f"build without --workers or leave {name} out"
            )
