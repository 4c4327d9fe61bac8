"""The subjects of `plan`: a recipe, a bundle, or a model's config.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdtrim_deploy.bundle import PLAN, Bundle
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.paths import expanded
from pdtrim_deploy.models.expert_savings import experts_sentence
from pdtrim_deploy.models.families import known_family
from pdtrim_deploy.models.shape import Sized, config_of, find_config, read_sized, shipped, shipped_for
from pdtrim_deploy.pipeline.family_fit import check_experts, check_family
from pdtrim_deploy.pipeline.recipe_fit import check_fits
from pdtrim_deploy.pipeline.stand_in import caveat, stand_in
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.blocks import SUBLAYER_SHARES
from pdtrim_deploy.recipe import Recipe

_RECIPE_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Subject:
    """A plan to price.

    Attributes:
        kind: "recipe" (its plan is a stand-in of the same size), "bundle" (decided), "config" (nothing pruned).
        model: the model's name in tables.
        max_positions: prompt and answer together must not be longer.
        notes: assumptions behind this plan.

    """

    name: str
    kind: str
    model: str
    plan: PDPlan
    max_positions: int
    notes: tuple[str, ...] = ()

    def check_length(self, isl: int, osl: int) -> None:
        """Refuse a request that is longer than the model's context."""
        if isl + osl > self.max_positions:
            raise UserError(
                f"{self.name}: --isl {isl} and --osl {osl} make {isl + osl} tokens, {self.model} takes at most "
                f"{self.max_positions}; lower one of them"
            )


def subjects(targets: Sequence[str], config: str | None = None) -> tuple[Subject, ...]:
    """One subject per target, with unique names; `config` gives the model of every recipe.

    Raises:
        UserError: no such target, a recipe whose model is not on this machine, or `config` without a recipe.

    """
    model = None if config is None else _sized(config)
    loaded = [_subject(target, model) for target in targets]
    if config is not None and not any(subject.kind == "recipe" for subject in loaded):
        raise UserError(f"--config {config} gives recipes a model, but no recipe is given; leave --config out")
    names = [subject.name for subject in loaded]
    unique = [t if names.count(subject.name) > 1 else subject.name for t, subject in zip(targets, loaded, strict=True)]
    return tuple(
        Subject(name, subject.kind, subject.model, subject.plan, subject.max_positions, subject.notes)
        for name, subject in zip(unique, loaded, strict=True)
    )


def _subject(target: str, model: Sized | None) -> Subject:
    path = expanded(target)
    if path.suffix in _RECIPE_SUFFIXES and not path.is_dir():
        return _of_recipe(Recipe.load(path), model)
    if (path / PLAN).is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        return _of_bundle(path)
    return _of_config(_sized(target))


def _of_recipe(recipe: Recipe, model: Sized | None) -> Subject:
    sized = model or _model_of(recipe)
    check_family(recipe, known_family(sized.architecture))
    check_experts(recipe, sized.experts)
    check_fits(recipe, sized.num_blocks, sized.max_positions)
    plan = stand_in(recipe, sized.shape(recipe.model.dtype), sized.experts)
    _check_pair(recipe.name, plan)
    note = (
        f"not built yet, priced by counts: prefill drops {recipe.pruning.prefill_blocks} and decode "
        f"{recipe.pruning.decode_blocks} of {sized.num_blocks} blocks, {caveat(recipe.kv, plan)}"
    )
    if recipe.target is not None:
        note = (
            f"not built yet, priced with all blocks whole and KV as small as the target has it ({recipe.target}): "
            "which actions reach it is known once effects are measured"
        )
    lost = recipe.pruning
    sublayers = (
        f"without sublayers of further blocks: attention of {lost.prefill_attentions} and MLP of {lost.prefill_mlps} "
        f"in prefill, of {lost.decode_attentions} and {lost.decode_mlps} in decode; attention counts as "
        f"{SUBLAYER_SHARES['attention']:.0%} of a block's work"
    )
    sentence = experts_sentence(plan, sized.config, quantised=bool(sized.config.get("quantization_config")))
    notes = (
        note,
        *[sublayers] * bool(lost.decode_sublayers),
        *([sentence] if sentence else []),
        f"model: {sized.origin}",
    )
    return Subject(recipe.name, "recipe", sized.label, plan, sized.max_positions, notes)


def _of_bundle(path: Path) -> Subject:
    bundle = Bundle.open(path)
    _check_pair(str(path), bundle.plan)
    config = json.loads((bundle.decode_dir / "config.json").read_text())
    source = bundle.recipe.model.source
    known = shipped_for(source)
    model = known.stem if known else source.rpartition("/")[2]
    return Subject(path.resolve().name, "bundle", model, bundle.plan, config["max_position_embeddings"])


def _check_pair(name: str, plan: PDPlan) -> None:
    if plan.unified:
        raise UserError(
            f"{name} is one model for both stages, whose KV takes no link: `plan` prices pairs; see "
            "`pdtrim-deploy build --dry-run` for what it weighs"
        )


def _of_config(sized: Sized) -> Subject:
    dtype = sized.kv_dtype or "bfloat16"
    dtype_note = () if sized.kv_dtype else (f"{sized.origin} names no dtype: bfloat16",)
    notes = ("a model without a recipe: nothing pruned", f"model: {sized.origin}", *dtype_note)
    return Subject(sized.label, "config", sized.label, PDPlan.dense(sized.shape(dtype)), sized.max_positions, notes)


def _sized(text: str) -> Sized:
    path = find_config(text)
    if path is None:
        raise UserError(
            f"{text}: no such recipe, bundle or config.json; give one of these or a shipped model: {_names()}"
        )
    return read_sized(path)


def _model_of(recipe: Recipe) -> Sized:
    """The shape of the recipe's own model; reads no weights."""
    known = config_of(recipe.model.source)
    if known is None:
        raise UserError(
            f"recipe {recipe.name}: no config.json of {recipe.model.source} is here; give --config with the file or a "
            f"shipped model: {_names()}"
        )
    return read_sized(known)


def _names() -> str:
    return ", ".join(shipped())
