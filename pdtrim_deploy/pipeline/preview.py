"""What a build would do and how large things would be: seconds, no weights, nothing written but the cache's digests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from pdtrim_deploy.cache import Cache
from pdtrim_deploy.checkpoints import Checkpoint, resolve
from pdtrim_deploy.pipeline.build import check_fits, is_sealed, steps_of
from pdtrim_deploy.pipeline.journal import Journal
from pdtrim_deploy.pipeline.stand_in import stand_in
from pdtrim_deploy.plan import STAGES, Stage
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.wire import ITEM_BYTES


@dataclass(frozen=True)
class Preview:
    """`steps` -> done already?; sizes in bytes, None while the source is not in the cache.

    Attributes:
        stage_bytes: weights of each stage checkpoint.
        planned_bytes, dense_bytes: KV of one request of `prompt_tokens`; `planned_bytes` as `stand_in` has it.

    """

    recipe: Recipe
    steps: dict[str, bool]
    prompt_tokens: int
    stage_bytes: dict[Stage, int] | None
    planned_bytes: int | None
    dense_bytes: int | None


def preview(recipe: Recipe, out: Path, cache: Cache) -> Preview:
    """Look at the source, when it is there, and at what stands in `out`.

    Raises:
        UserError: bad source, or the recipe asks for more blocks than the model has.

    """
    prompt_tokens = recipe.evaluation.prompt_tokens
    try:
        checkpoint = resolve(recipe.model.source, _Peek(cache.root))
    except _NotCached:
        names = ("source", *(step.name for step in steps_of(recipe, "")), "seal")
        return Preview(recipe, dict.fromkeys(names, False), prompt_tokens, None, None, None)
    check_fits(recipe, checkpoint.facts.num_blocks)
    journal = Journal(out)
    steps = {"source": True}
    for step in steps_of(recipe, checkpoint.fingerprint):
        steps[step.name] = journal.done(step.name, step.key)
    steps["seal"] = all(steps.values()) and is_sealed(out, recipe, journal)
    plan = stand_in(recipe, checkpoint.shape(recipe.model.dtype))
    sizes = {stage: _stage_bytes(checkpoint, len(plan.layers(stage)), recipe.model.dtype) for stage in STAGES}
    return Preview(
        recipe, steps, prompt_tokens, sizes, plan.payload_bytes(prompt_tokens), plan.dense_bytes(prompt_tokens)
    )


class _NotCached(Exception):
    pass


class _Peek(Cache):
    """A cache that fetches nothing; fingerprints are cheap and may be taken."""

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
