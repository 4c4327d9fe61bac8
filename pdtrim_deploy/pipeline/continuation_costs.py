"""What the dense model's own words take, before a weight is read (`pipeline.on_policy`). No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.pipeline.heal import needed
from pdtrim_deploy.recipe import CalibrationSection, Recipe
from pdtrim_deploy.recipe.kv import FIXED_KV

_ROWS = 32  # rows of a product that take as long as reading the weights: a token of 8 prompts costs no less
_AT_ONCE, _FLOAT = CalibrationSection.AT_ONCE, 4
_ID = 8  # bytes of a token's id as JSON


@dataclass(frozen=True)
class Text:
    """Calibration text of so many sequences, which the model goes on with behind their prompts."""

    sequences: int
    length: int
    prompt: int


@dataclass(frozen=True)
class ContinuationCost:
    """Of all texts that a step is the first to read.

    Attributes:
        flops: operations, likely; reading all weights for each token of few prompts counted as operations.
        memory: bytes beside the whole model's.
        files: bytes of what is kept, twice while it is written.

    """

    flops: float = 0.0
    memory: float = 0.0
    files: float = 0.0


def continuation_costs(recipe: Recipe, sizes: ModelSizes, item: int) -> dict[str, ContinuationCost]:
    """By the names of steps; empty where text reads on. `item`: bytes of a number that the model computes in."""
    costs, known = dict[str, ContinuationCost](), set[Text]()
    if recipe.calibration.continuations == "text":
        return costs
    for step, text in _read(recipe):
        if text not in known and text.prompt < text.length:
            known.add(text)
            costs[step] = _with(costs.get(step, ContinuationCost()), text, sizes, item)
    return costs


def _read(recipe: Recipe) -> Iterator[tuple[str, Text]]:
    """Which texts each step reads, in order (`pipeline.texts`, `select_kv`, `heal_kv`)."""
    text, pruning, healing, kv = recipe.calibration, recipe.pruning, recipe.healing, recipe.kv
    searched = Text(text.sequences, text.length, text.prompt)
    fitted = Text(healing.sequences, healing.length, healing.length // 2) if healing.enabled else searched
    if recipe.target is not None:
        yield "target", Text(kv.sequences, kv.prompt_tokens + kv.continuation_tokens, kv.prompt_tokens)
    if pruning.decode_loses:
        yield "prune", searched
        if pruning.finalists or pruning.distil:
            yield "prune", fitted
    if pruning.experts is not None:
        yield "experts", searched
    if needed(recipe):
        yield "heal", fitted
    if kv.method not in FIXED_KV:
        yield from (("select-kv", Text(kv.sequences, n + kv.continuation_tokens, n)) for n in kv.prompts)
    if healing.kv_steps:
        yield "heal-kv", Text(healing.sequences, kv.prompt_tokens + healing.length // 2, kv.prompt_tokens)


def _with(cost: ContinuationCost, text: Text, sizes: ModelSizes, item: int) -> ContinuationCost:
    weights, tokens = sizes.active * sizes.blocks, text.length - text.prompt
    together, groups = min(_AT_ONCE, text.sequences), -(-text.sequences // _AT_ONCE)
    flops = 2.0 * weights * text.sequences * text.prompt
    flops += 2.0 * groups * tokens * max(_ROWS, together) * (weights + sizes.vocabulary * sizes.hidden)
    rows = 2 * sizes.kv_width * together * text.length * (sizes.blocks + 1)  # a layer's twice, as it grows
    running = together * text.prompt * (6 * sizes.hidden + 3 * min(sizes.inner, 8 * sizes.expert_width))
    chances = together * sizes.vocabulary * (item + _FLOAT + 3 * 2 * _FLOAT)  # and their sums, in float64
    memory = max(cost.memory, item * (rows + running) + chances)
    return ContinuationCost(cost.flops + flops, memory, cost.files + 2 * _ID * text.sequences * tokens)
