"""Whether a recipe may ask what it asks of a model's family and weights: what would be wrong is refused at once."""

from __future__ import annotations

from collections.abc import Iterator

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.families import FAMILIES, Family
from pdtrim_deploy.models.families.blocks import Feature
from pdtrim_deploy.models.quantized import Quantized
from pdtrim_deploy.plan import STAGES, ExpertShape
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.recipe.kv import WINDOWS_KV


def check_quantized(recipe: Recipe, quantized: Quantized | None) -> None:
    """Refuse what no FP8 weights can have.

    Raises:
        UserError: the recipe's key, why, and what is allowed.

    """
    if quantized is None:
        return
    if recipe.targets.requested:
        raise UserError(
            f"recipe {recipe.name}: targets has {', '.join(recipe.targets.requested)}, but no engine computes with "
            f"weights in {quantized.label}; leave targets out, or give the unquantised model"
        )
    if recipe.model.dtype == "float32":
        raise UserError(
            f"recipe {recipe.name}: model.dtype is float32, in which SGLang has no FP8 weights; allowed for weights in "
            f"{quantized.label}: bfloat16, float16"
        )


def check_family(recipe: Recipe, family: Family) -> None:
    """Refuse what needs blocks, or a graph, where they are not known, and what the family's file refuses.

    Raises:
        UserError: the recipe's key, why, and what is allowed.

    """
    if family.windows is not None and recipe.kv.method not in WINDOWS_KV:
        raise UserError(
            f"recipe {recipe.name}: kv.method is {recipe.kv.method}, which would choose layers with sliding windows of "
            f"{family.architecture} too, whose rows cannot be cut; allowed: {', '.join(WINDOWS_KV)}"
        )
    if family.latents and recipe.kv.method != "none":
        raise UserError(
            f"recipe {recipe.name}: kv.method is {recipe.kv.method}, but of {family.architecture}, which keeps latents "
            "(MLA), all rows travel; allowed: none, with kv.wire_dtype int8, int4 or int3"
        )
    if family.linear_attention and recipe.kv.method != "none":
        raise UserError(
            f"recipe {recipe.name}: kv.method is {recipe.kv.method}, but of {family.architecture}, whose other layers "
            "keep a state, all rows of KV travel; allowed: none, with any kv.wire_dtype"
        )
    if recipe.targets.requested and (reason := family.no_engine) is not None:
        raise UserError(
            f"recipe {recipe.name}: targets has {', '.join(recipe.targets.requested)}, but {family.architecture} has "
            f"no engine: {reason}; leave targets out, SGLang's own model serves it"
        )
    for key, value, neutral, feature in (*_of_target(recipe), *_requests(recipe)):
        if family.blocks is None:
            raise UserError(
                f"recipe {recipe.name}: {key} is {value}, but of {family.architecture} the KV alone is known, not its "
                f"blocks; allowed: {neutral}, or one of {', '.join(FAMILIES)}"
            )
        if feature is not None and (reason := family.refusal(feature)):
            raise UserError(
                f"recipe {recipe.name}: {key} is {value}, which is wrong for {family.architecture}: {reason}; "
                f"allowed: {neutral}"
            )


def check_experts(recipe: Recipe, shape: ExpertShape | None) -> None:
    """Refuse numbers of experts that a model with such experts, or with none (None), cannot keep.

    Raises:
        UserError: the recipe's key, and what is allowed.

    """
    if (section := recipe.pruning.experts) is None:
        return
    if shape is None:
        raise UserError(
            f"recipe {recipe.name}: pruning.experts is given but the model's blocks have no experts; allowed: to leave "
            "it out"
        )
    for stage in STAGES:
        if getattr(section, stage) is None:
            continue
        try:
            shape.check_count(section.count(stage, shape.count))
        except ValueError as error:
            raise UserError(
                f"recipe {recipe.name}: pruning.experts.{stage} is {getattr(section, stage):g}: {error}"
            ) from None


def _of_target(recipe: Recipe) -> Iterator[tuple[str, object, str, Feature | None]]:
    """As `_requests`: what a target's answer may have."""
    features: tuple[Feature, ...] = ("sublayers", "kv_only_blocks")
    return ((("target", str(recipe.target), "to leave it out", feature)) for feature in features if recipe.target)


def _requests(recipe: Recipe) -> Iterator[tuple[str, object, str, Feature | None]]:
    """Key and value of everything that needs blocks, the value that asks for nothing, and what it is for families."""
    pruning, healing = recipe.pruning, recipe.healing
    if pruning.decode_blocks:
        yield "pruning.decode_blocks", pruning.decode_blocks, "0", None
    for key in ("decode_attentions", "decode_mlps"):
        if getattr(pruning, key):
            yield f"pruning.{key}", getattr(pruning, key), "0", "sublayers"
    if pruning.experts is not None:
        yield "pruning.experts", "given", "to leave it out", None
    if pruning.distil:
        yield "pruning.distil", "true", "false", "distil"
    if pruning.blocks_in_memory is not None:
        yield "pruning.blocks_in_memory", pruning.blocks_in_memory, "to leave it out", "blocks_in_memory"
    if healing.kv_only_blocks:
        yield "healing.kv_only_blocks", healing.kv_only_blocks, "0", "kv_only_blocks"
    if healing.compensation == "norm":
        yield "healing.compensation", "norm", "none", "norm"
    if healing.compensation == "least-squares":
        yield "healing.compensation", "least-squares", "none", "least-squares"
    for name in ("prefill_steps", "decode_steps", "kv_steps"):
        if steps := getattr(healing, name):
            yield f"healing.{name}", steps, "0", "training"
