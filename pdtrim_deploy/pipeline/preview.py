"""What a build would do and how large things would be: seconds, no weights, nothing written but the cache's digests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import ON_CPU, Compute
from pdtrim_deploy.local.paths import expanded
from pdtrim_deploy.models import Family, resolve
from pdtrim_deploy.models.body import body_width, narrowed
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.families import family_of
from pdtrim_deploy.models.quantized import read_quantized
from pdtrim_deploy.models.shape import shape_of, shipped_for
from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.pipeline.build_steps import done_steps, steps_of
from pdtrim_deploy.pipeline.context import Context
from pdtrim_deploy.pipeline.family_fit import check_experts, check_family, check_quantized
from pdtrim_deploy.pipeline.fit_tokens import fit_sentence
from pdtrim_deploy.pipeline.journal import Journal, refuse_strangers
from pdtrim_deploy.pipeline.limits import fit_build
from pdtrim_deploy.pipeline.rates import Rates, measure
from pdtrim_deploy.pipeline.recipe_fit import check_fits
from pdtrim_deploy.pipeline.sealing import is_sealed
from pdtrim_deploy.pipeline.stand_in import stand_in
from pdtrim_deploy.pipeline.step_cost import StepCost
from pdtrim_deploy.pipeline.step_costs import limited_recipe, step_costs
from pdtrim_deploy.pipeline.texts import check_file, check_texts
from pdtrim_deploy.plan import PDPlan, Stage
from pdtrim_deploy.plan.wire import ITEM_BYTES
from pdtrim_deploy.pruning.cost import SearchCost, search_cost
from pdtrim_deploy.pruning.expert_cost import ExpertCost, expert_cost
from pdtrim_deploy.recipe import Recipe

_LAYERS = "model.layers."


@dataclass(frozen=True)
class Preview:
    """`steps` -> done already?; sizes in bytes, None while the source is not in the cache.

    Attributes:
        stage_bytes: weights of each checkpoint, by its folder; of prefill with second K and V projections, if any.
        planned_bytes, dense_bytes, dense_fp8_bytes: KV of one request of `prompt_tokens`: as `stand_in` has it, of the
            unpruned model from the plan's own kind of pool, and from one of fp8.
        search: what choosing the blocks costs; None when none is to be chosen, or nothing is known of the model.
        search_seconds: of it, at the rates.
        experts: what ranking the experts costs; None when none are ranked, or nothing is known of the model.
        experts_seconds: the same of it.
        costs: of each step; None where nothing is known of the model.
        rates: of this machine, that time is estimated by; None where nothing is known of the model.
        limits: what the allowed memory asks for, a sentence.
        fit: whether text is too short for least squares, a sentence.
        missing: why the sizes are not known, a sentence.

    """

    recipe: Recipe
    steps: dict[str, bool]
    prompt_tokens: int
    stage_bytes: dict[str, int] | None
    planned_bytes: int | None
    dense_bytes: int | None
    dense_fp8_bytes: int | None
    search: SearchCost | None = None
    search_seconds: float | None = None
    experts: ExpertCost | None = None
    experts_seconds: float | None = None
    missing: str | None = None
    costs: Mapping[str, StepCost] | None = None
    rates: Rates | None = None
    limits: str | None = None
    fit: str | None = None

    @property
    def left(self) -> dict[str, StepCost]:
        """Costs of the steps that are to do, where anything is known of the model."""
        return {name: cost for name, cost in (self.costs or {}).items() if not self.steps[name]}


def preview(recipe: Recipe, out: Path, cache: Cache, compute: Compute = ON_CPU) -> Preview:
    """Look at the source, when it is there, and at what stands in `out`.

    Of a model whose config.json alone is here, in its folder or among the facts that we ship, the steps are priced.

    Raises:
        UserError: bad source, text that cannot be read or is too little, `out` holds something else, or the recipe asks
            for more than the model has, or than the memory that `compute` allows.

    """
    refuse_strangers(out)
    for part in recipe.calibration.shares:
        with suppress(_NotCached):  # Parquet is read when it is built
            check_file(part.corpus, _Peek(cache.root))
    prompt_tokens = recipe.evaluation.prompt_tokens
    try:
        checkpoint = resolve(recipe.model.source, _Peek(cache.root))
    except _NotCached:
        source = recipe.model.source
        return _unseen(recipe, _config_alone(source), f"{source} is not in the cache yet", compute)
    except UserError as error:
        config = _config_alone(recipe.model.source)
        if config is None:
            raise
        return _unseen(recipe, config, str(error), compute)
    check_family(recipe, checkpoint.family)
    experts = checkpoint.family.expert_shape(checkpoint.config)
    check_experts(recipe, experts)
    check_quantized(recipe, checkpoint.quantized)
    check_fits(recipe, checkpoint.facts.num_blocks, checkpoint.facts.max_positions)
    journal = Journal(out)
    build_steps = steps_of(recipe, checkpoint.fingerprint)
    done = done_steps(build_steps, journal)
    _check_texts(Context(recipe, checkpoint, _Peek(cache.root), out, lambda _: None), done)
    steps = {"source": True} | {step.name: step.name in done for step in build_steps}
    steps["seal"] = all(steps.values()) and is_sealed(out, recipe, journal.steps)
    plan = stand_in(recipe, checkpoint.shape(recipe.model.dtype), experts)
    item = ITEM_BYTES[recipe.model.dtype]
    tensors = {
        name: (info.nbytes if checkpoint.keeps_dtype(name) else info.elements * item, (*info.shape, 1)[0])
        for name, info in checkpoint.tensors.items()
    }
    sizes = {
        name: _bytes_of(tensors, checkpoint.family, plan, stage, plan.layers(stage))
        for name, stage in plan.checkpoints.items()
    }
    if plan.kv_only_tail:
        tensors |= _narrowed(checkpoint.family, checkpoint.config, plan, item, checkpoint.quantized is not None)
        sizes["prefill"] += _bytes_of(tensors, checkpoint.family, plan, "prefill", plan.kv_only_blocks)
    done = {step for step, is_done in steps.items() if is_done}
    costs = _costs(recipe, checkpoint.config, compute, done)
    return Preview(recipe, steps, prompt_tokens, sizes, *_sent(plan, prompt_tokens), **costs)


def _check_texts(context: Context, done: Collection[str]) -> None:
    """`check_texts`, where all corpora are here: nothing is fetched."""
    if any(part.corpus.startswith("hub:") for part in context.recipe.calibration.shares):
        return
    with suppress(_NotCached):
        check_texts(context, done)


def _costs(recipe: Recipe, config: dict[str, Any], compute: Compute, done: Collection[str]) -> dict[str, Any]:
    """What a preview says of time and memory."""
    limited = fit_build(recipe, config, compute)
    rates, bounded = measure(recipe, config, compute), limited_recipe(recipe, limited)
    search = None if "prune" in done else search_cost(config, bounded.pruning, recipe.calibration, recipe.healing)
    experts = None if "experts" in done else expert_cost(config, bounded.pruning, recipe.calibration)
    limits = None
    if limited.blocks_in_memory is not None and limited.streams(config["num_hidden_layers"]):
        limits = f"{limited.blocks_in_memory} of {config['num_hidden_layers']} blocks in memory at a time"
    return {
        "search": search,
        "search_seconds": _at(rates, search),
        "experts": experts,
        "experts_seconds": _at(rates, experts),
        "costs": step_costs(recipe, config, limited),
        "rates": rates,
        "limits": limits,
        "fit": fit_sentence(recipe, ModelSizes.of(config)),
    }


def _at(rates: Rates, cost: SearchCost | ExpertCost | None) -> float | None:
    """Seconds of a part of a step."""
    return None if cost is None or rates.products is None else cost.flops / rates.products


def _sent(plan: PDPlan, tokens: int) -> tuple[int, int, int]:
    """Bytes of a request's KV: as planned, dense, and dense from an fp8 pool."""
    return plan.payload_bytes(tokens), plan.dense_bytes(tokens), plan.dense_bytes(tokens, "fp8_e4m3")


def _unseen(recipe: Recipe, config: dict[str, Any] | None, missing: str, compute: Compute) -> Preview:
    names = ("source", *(step.name for step in steps_of(recipe, "")), "seal")
    steps, tokens = dict.fromkeys(names, False), recipe.evaluation.prompt_tokens
    if config is None:
        return Preview(recipe, steps, tokens, None, None, None, None, missing=missing)
    family = family_of(config, recipe.model.source)
    experts = family.expert_shape(config)
    check_family(recipe, family)
    check_experts(recipe, experts)
    quantized = read_quantized(expanded(recipe.model.source.partition(":")[2]), config)
    check_quantized(recipe, quantized)
    check_fits(recipe, config["num_hidden_layers"], config["max_position_embeddings"])
    plan = stand_in(recipe, shape_of(config, "config alone", recipe.model.dtype), experts)
    item, shapes = ITEM_BYTES[recipe.model.dtype], family.required_tensors(config) if family.blocks else {}
    tensors = {
        name: (prod(shape) * (1 if quantized and _is_linear(name, shape) else item), shape[0])
        for name, shape in shapes.items()
    }
    stages = plan.checkpoints if tensors else {}
    sizes = {
        name: _bytes_of(tensors, family, plan, stage, plan.layers(stage)) for name, stage in stages.items()
    } or None
    if sizes and plan.kv_only_tail:
        tensors |= _narrowed(family, config, plan, item, quantized is not None)
        sizes["prefill"] += _bytes_of(tensors, family, plan, "prefill", plan.kv_only_blocks)
    costs = _costs(recipe, config, compute, ())
    return Preview(recipe, steps, tokens, sizes, *_sent(plan, tokens), missing=missing, **costs)


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is codes in a quantised checkpoint, as far as its config tells; scales are below 1 %."""
    return len(shape) == 2 and name.startswith("model.layers.")


def _config_alone(source: str) -> dict[str, Any] | None:
    """The config.json of a model whose weights are not here."""
    kind, _, place = source.partition(":")
    if kind == "hf" and (folder := expanded(place)).exists():
        alone = (folder / "config.json").is_file() and not any(folder.glob("*.safetensors"))
        return read_config(folder / "config.json") if alone else None
    known = shipped_for(source)
    return None if known is None else read_config(known)


class _NotCached(Exception):
    pass


class _Peek(Cache):
    """A cache that fetches nothing; fingerprints may be taken: they say which steps are done."""

    def entry(self, kind: str, key: str, make: Callable[[Path], None]) -> Path:
        def refuse(_: Path) -> None:
            raise _NotCached

        return super().entry(kind, key, make if kind == "fingerprints" else refuse)


def _narrowed(
    family: Family, config: Mapping[str, Any], plan: PDPlan, item: int, quantized: bool
) -> dict[str, tuple[int, int]]:
    """Bytes and rows of tensors of the body's blocks that may have another size there than in the model."""
    shapes = narrowed(family, config, plan.kv_only_blocks, body_width(config, quantized=quantized))
    return {name: (prod(shape) * item, shape[0]) for name, shape in shapes.items()}


def _bytes_of(
    tensors: Mapping[str, tuple[int, int]], family: Family, plan: PDPlan, stage: Stage, blocks: Sequence[int]
) -> int:
    """Of a stage's checkpoint of these blocks, with tensors of so many bytes and rows; what is no block is in each."""
    from pdtrim_deploy.models.experts import ExpertNames

    kept, total = plan.kept_experts(stage), 0
    by_block = {block: ExpertNames(family, kept.get(block)) for block in blocks}
    for name, (size, rows) in tensors.items():
        if not name.startswith(_LAYERS):
            total += size
            continue
        number, _, inner = name.removeprefix(_LAYERS).partition(".")
        names = by_block.get(int(number))
        if names is not None and names.in_stage(inner) is not None:
            stage_rows = names.rows(inner)
            total += size if stage_rows is None else size // rows * len(stage_rows)
    return total
