"""What a build would do and how large things would be: seconds, no weights, nothing written but the cache's digests."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.paths import expanded
from pdtrim_deploy.models import Checkpoint, resolve
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.families import family_of
from pdtrim_deploy.pipeline.build import check_fits, done_steps, steps_of
from pdtrim_deploy.pipeline.family_fit import check_experts, check_family
from pdtrim_deploy.pipeline.journal import Journal, refuse_strangers
from pdtrim_deploy.pipeline.sealing import is_sealed
from pdtrim_deploy.pipeline.stand_in import stand_in
from pdtrim_deploy.plan import STAGES, Stage
from pdtrim_deploy.plan.wire import ITEM_BYTES
from pdtrim_deploy.pruning.cost import SearchCost, search_cost
from pdtrim_deploy.recipe import Recipe

MOST_ROWS = 512  # of a product that the machine's speed is taken from: more are no faster, and one takes longer


@dataclass(frozen=True)
class Preview:
    """`steps` -> done already?; sizes in bytes, None while the source is not in the cache.

    Attributes:
        stage_bytes: weights of each stage checkpoint.
        planned_bytes, dense_bytes, dense_fp8_bytes: KV of one request of `prompt_tokens`: as `stand_in` has it, of the
            unpruned model from the plan's own kind of pool, and from one of fp8.
        search: what choosing the blocks costs; None when none is to be chosen, or nothing is known of the model.
        search_seconds: of it, at the speed that this machine multiplies matrices of that size at just now.
        missing: why the sizes are not known, a sentence.

    """

    recipe: Recipe
    steps: dict[str, bool]
    prompt_tokens: int
    stage_bytes: dict[Stage, int] | None
    planned_bytes: int | None
    dense_bytes: int | None
    dense_fp8_bytes: int | None
    search: SearchCost | None = None
    search_seconds: float | None = None
    missing: str | None = None


def preview(recipe: Recipe, out: Path, cache: Cache) -> Preview:
    """Look at the source, when it is there, and at what stands in `out`.

    Of a model whose config.json alone is here, in its folder or among the facts that we ship, the search is priced.

    Raises:
        UserError: bad source, `out` holds something else, or the recipe asks for more than the model has.

    """
    refuse_strangers(out)
    prompt_tokens = recipe.evaluation.prompt_tokens
    try:
        checkpoint = resolve(recipe.model.source, _Peek(cache.root))
    except _NotCached:
        return _unseen(recipe, None, f"{recipe.model.source} is not in the cache yet")
    except UserError as error:
        config = _config_alone(recipe.model.source)
        if config is None:
            raise
        return _unseen(recipe, config, str(error))
    check_family(recipe, checkpoint.family)
    experts = checkpoint.family.expert_shape(checkpoint.config)
    check_experts(recipe, experts)
    check_fits(recipe, checkpoint.facts.num_blocks, checkpoint.facts.max_positions)
    journal = Journal(out)
    build_steps = steps_of(recipe, checkpoint.fingerprint)
    done = done_steps(build_steps, journal)
    steps = {"source": True} | {step.name: step.name in done for step in build_steps}
    steps["seal"] = all(steps.values()) and is_sealed(out, recipe, journal.steps)
    plan = stand_in(recipe, checkpoint.shape(recipe.model.dtype), experts)
    sizes = {stage: _stage_bytes(checkpoint, len(plan.layers(stage)), recipe.model.dtype) for stage in STAGES}
    sent = (
        plan.payload_bytes(prompt_tokens),
        plan.dense_bytes(prompt_tokens),
        plan.dense_bytes(prompt_tokens, "fp8_e4m3"),
    )
    search, seconds = (None, None) if steps["prune"] else _search(recipe, checkpoint.config)
    return Preview(recipe, steps, prompt_tokens, sizes, *sent, search, seconds)


def _unseen(recipe: Recipe, config: dict[str, Any] | None, missing: str) -> Preview:
    names = ("source", *(step.name for step in steps_of(recipe, "")), "seal")
    if config is not None:
        family = family_of(config, recipe.model.source)
        check_family(recipe, family)
        check_experts(recipe, family.expert_shape(config))
        check_fits(recipe, config["num_hidden_layers"], config["max_position_embeddings"])
    search, seconds = (None, None) if config is None else _search(recipe, config)
    steps = dict.fromkeys(names, False)
    return Preview(recipe, steps, recipe.evaluation.prompt_tokens, None, None, None, None, search, seconds, missing)


def _config_alone(source: str) -> dict[str, Any] | None:
    """The config.json of a model whose weights are not here."""
    from pdtrim_deploy.models.shape import shipped_for

    kind, _, place = source.partition(":")
    if kind == "hf" and (folder := expanded(place)).exists():
        alone = (folder / "config.json").is_file() and not any(folder.glob("*.safetensors"))
        return read_config(folder / "config.json") if alone else None
    known = shipped_for(source)
    return None if known is None else read_config(known)


def _search(recipe: Recipe, config: dict[str, Any]) -> tuple[SearchCost | None, float | None]:
    cost = search_cost(config, recipe.pruning, recipe.calibration, recipe.healing)
    if cost is None:
        return None, None
    return cost, cost.flops / _speed(config["hidden_size"], config["intermediate_size"], recipe.calibration.length)


def _speed(hidden: int, intermediate: int, tokens: int) -> float:
    """Operations a second of float32 products as wide as a block's, in a second or so."""
    import torch

    tokens = min(tokens, MOST_ROWS)
    left, right = torch.randn(tokens, hidden), torch.randn(hidden, intermediate)
    left @ right
    began, times = time.perf_counter(), 0
    while time.perf_counter() - began < 0.2:
        left @ right
        times += 1
    return 2 * tokens * hidden * intermediate * times / (time.perf_counter() - began)


class _NotCached(Exception):
    pass


class _Peek(Cache):
    """A cache that fetches nothing; fingerprints may be taken: they say which steps are done."""

    def entry(self, kind: str, key: str, make: Callable[[Path], None]) -> Path:
        def refuse(_: Path) -> None:
            raise _NotCached

        return super().entry(kind, key, make if kind == "fingerprints" else refuse)


def _stage_bytes(checkpoint: Checkpoint, layers: int, dtype: str) -> int:
    """Every block has the same size; what is no block is in both stages."""
    elements = {name: prod(info.shape) for name, info in checkpoint.tensors.items()}
    in_blocks = sum(count for name, count in elements.items() if name.startswith("model.layers."))
    per_block, rest = in_blocks // checkpoint.facts.num_blocks, sum(elements.values()) - in_blocks
    return (per_block * layers + rest) * ITEM_BYTES[dtype]
