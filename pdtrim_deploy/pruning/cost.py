"""What a search will cost, before a weight is read: from config.json and the recipe's numbers. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pdtrim_deploy.models.weights import ModelSizes
from pdtrim_deploy.recipe import CalibrationSection
from pdtrim_deploy.recipe.healing import HealingSection
from pdtrim_deploy.recipe.pruning import EVALUATED, PruningSection

# Share of the work that early stopping leaves; not a promise. RACED was measured on SmolLM2-135M with 16 x 256 tokens
# (prefill 0.16 for 2 rounds, decode 0.26 for 4), ANNEALED is assumed.
RACED, ANNEALED = 0.22, 0.3
_FLOAT = 4  # the search computes in float32


@dataclass(frozen=True)
class SearchCost:
    """Of both stages' searches.

    Attributes:
        weights: bytes of the dense model in float32 that are in memory at a time.
        states: bytes of hidden states kept in memory, at most; `states_wanted` is what one whole model's would take.
        disk: bytes of hidden states kept in files, at most, those that students are fitted to among them.
        prompt_kv: bytes of the calibration prompts' K and V that decode's search reads.
        fitted: bytes of normal equations and new maps, where students are made or finalists refitted.
        most: block-forwards at most (blocks run, times sequences): no candidate stopped early.
        likely: with candidates stopped early about as often as on SmolLM2-135M.
        heads: sequences whose loss is taken, likely; each runs the LM head.
        flops: of the likely work.

    """

    weights: int
    states: int
    states_wanted: int
    disk: int
    prompt_kv: int
    fitted: int
    most: int
    likely: int
    heads: int
    flops: float

    @property
    def memory(self) -> int:
        """Bytes at most, besides the program and what runs at the moment."""
        return self.weights + self.states + self.prompt_kv + self.fitted


def search_cost(
    config: Mapping[str, Any], pruning: PruningSection, text: CalibrationSection, healing: HealingSection | None = None
) -> SearchCost | None:
    """`config` is config.json's; None when no block is to go. Finalists are judged on the text of `healing`."""
    if not pruning.decode_blocks:
        return None
    sizes = ModelSizes.of(config)
    blocks = sizes.blocks
    count, length = text.sequences, text.length
    stages = [(0, pruning.prefill_blocks, length), (pruning.prefill_blocks, pruning.decode_blocks, length // 2)]
    most = likely = losses = flops = 0.0
    refits = healing is not None and pruning.finalists > 0 and healing.compensation == "least-squares"
    for first, last, tokens in stages:
        if last == first:
            continue
        work = _WORK[pruning.method](blocks, first, last, pruning.steps)
        prompt = 0 if first == 0 and last == pruning.prefill_blocks else blocks - first
        most += (work.most + prompt) * count
        likely += (work.likely + prompt) * count
        losses += work.losses * count
        flops += count * tokens * 2 * (work.likely * sizes.block + work.losses * sizes.vocabulary * sizes.hidden)
        flops += count * (length - tokens) * 2 * prompt * sizes.block
    if healing is not None and pruning.finalists:
        judging = judged_forwards(
            blocks,
            pruning.prefill_blocks,
            pruning.decode_blocks,
            healing.judged,
            pruning.finalists,
            pruning.finalists,
            together=(pruning.blocks_in_memory or blocks) >= blocks,
            twice=healing.compensation == "norm",
        )
        windows = _windows(blocks, pruning.prefill_blocks, pruning.decode_blocks, count)
        most, likely = most + judging + windows, likely + judging + windows
        flops += 2 * sizes.block * (judging * healing.length + windows * length)
        flops += refits * sizes.fit_flops * healing.judged * _refitted(blocks, pruning, healing.length)
        most += _again(blocks, pruning, count, healing)
    if pruning.distil:  # redundancy and states by one pass each; each pair's student begins as the better of two
        taught, tokens = _taught(pruning, text, healing)
        making, pairs = (count + 2 * taught) * blocks, blocks // 2
        most, likely = most + making, likely + making
        flops += 2 * sizes.block * blocks * (count * length + 2 * taught * tokens)
        flops += 2 * pairs * sizes.fit_flops * taught * tokens
    state = count * length * sizes.hidden * _FLOAT  # between two layers
    if pruning.method in EVALUATED:  # every state that is made is kept, as long as there is room
        states = min(pruning.memory_mb << 20, round(most / count) * state)
        disk = min(pruning.disk_mb << 20, round(most / count) * state - states)
    else:
        states, disk = (pruning.decode_blocks + 1 if pruning.method == "streamline" else 2) * state, 0
    return SearchCost(
        weights=(min(blocks, pruning.blocks_in_memory or blocks) * sizes.block + sizes.ends) * _FLOAT,
        states=states,
        states_wanted=blocks * state,
        disk=disk + (_hidden_files(sizes, *_taught(pruning, text, healing)) if pruning.distil else 0),
        prompt_kv=2 * blocks * count * (length // 2) * sizes.kv_width * _FLOAT,
        fitted=fitted_bytes(sizes, pruning, refits) if refits or pruning.distil else 0,
        most=round(most),
        likely=round(likely),
        heads=round(losses),
        flops=flops,
    )


def fitted_bytes(sizes: ModelSizes, pruning: PruningSection, refits: bool) -> int:
    """Bytes of one block's normal equations, and of the maps that a stage's refit gives.

    Of the latter there is at most one a block, of each of the finalists that are compensated side by side; in front of
    decode's finalists, prefill's from either half of the text too.
    """
    held = max(1, pruning.finalists) if pruning.blocks_in_memory is None else 1
    if pruning.finalists and 0 < pruning.prefill_blocks < pruning.decode_blocks:
        held += 2
    maps = held * sizes.blocks * sizes.inner * sizes.hidden if refits else 0
    return sizes.fit_bytes + _FLOAT * maps


def _taught(pruning: PruningSection, text: CalibrationSection, healing: HealingSection | None) -> tuple[int, int]:
    """Sequences that students learn from, and their length (`pipeline.texts.taught`)."""
    if healing is None or not healing.asked:
        return text.sequences, text.length
    return healing.taught(pruning.finalists), healing.length


def _hidden_files(sizes: ModelSizes, sequences: int, length: int) -> int:
    """Bytes of what students are fitted to (`students.states`)."""
    return (sizes.blocks + 1) * sequences * length * sizes.hidden * _FLOAT


def judged_forwards(
    blocks: int,
    prefill_lost: int,
    decode_lost: int,
    sequences: int,
    prefill_judged: int,
    decode_judged: int,
    together: bool = True,
    twice: bool = False,
) -> int:
    """Block-forwards of compensating and judging so many finalists of each stage (`refitted`), at most.

    Each sequence is fitted on once and judged on once. Fitting runs, where a layer is refitted, twice the stage; around
    it the dense model and, for decode, prefill, once for all finalists or, if they are not compensated `together`, for
    each. Judging runs both stages. Prefill is compensated once for all of decode's. What may be left out where it does
    not help (`norm`) is judged `twice`, with it and without; fitting it runs the dense model alone.
    """
    prefill, decode, total = blocks - prefill_lost, blocks - decode_lost, 0
    if prefill_lost and prefill_judged:
        total += blocks * (1 if together else prefill_judged) + prefill_judged * (2 if twice else 3) * prefill
    if decode_lost > prefill_lost and decode_judged:
        count = 1 if together else decode_judged
        if twice:
            total += (3 * blocks + 2 * prefill if prefill_lost else 0) + blocks * count
            total += 2 * decode_judged * (prefill + decode)
        else:
            total += blocks + 2 * prefill + (blocks + prefill) * count + decode_judged * (prefill + 3 * decode)
    return sequences * total


def _windows(blocks: int, prefill_lost: int, decode_lost: int, sequences: int) -> int:
    """Block-forwards of looking for the best run of adjacent blocks in each stage, at most; half leave at each look."""
    looks, total = 2 + math.log2(sequences), 0.0
    for lost, before in ((prefill_lost, 0), (decode_lost, prefill_lost)):
        if lost > before:
            total += (blocks * looks + sequences) * (blocks - lost + 1)
    return round(total)


def _refitted(blocks: int, pruning: PruningSection, length: int) -> int:
    """Layers refitted to judge finalists, times tokens of a sequence that each is refitted on, at most."""
    first, last, total = pruning.prefill_blocks, pruning.decode_blocks, 0
    if first:
        total += pruning.finalists * (blocks - first) * length
    if last > first:
        total += bool(first) * (blocks - first) * length + pruning.finalists * (blocks - last) * (length // 2)
    return total


def _again(blocks: int, pruning: PruningSection, sequences: int, healing: HealingSection) -> int:
    """Block-forwards at most of searching decode once more, behind where prefill's search began.

    It is done where finalists gave prefill another answer: most often not, so nobody should wait for it.
    """
    first, last = pruning.prefill_blocks, pruning.decode_blocks
    if not 0 < first < last or pruning.finalists < 2:
        return 0
    work = _WORK[pruning.method](blocks, first, last, pruning.steps).most + blocks - first
    twice = healing.compensation == "norm"
    judged = judged_forwards(blocks, first, last, healing.judged, 0, pruning.finalists, together=False, twice=twice)
    return round(work * sequences) + _windows(blocks, first, last, sequences) + judged


@dataclass(frozen=True)
class _Work:
    """Of one stage, for one sequence: block-forwards at most and likely, losses taken likely."""

    most: float
    likely: float
    losses: float


def _greedy(blocks: int, first: int, last: int, _: int) -> _Work:
    """Behind each candidate of each round, and one whole run of the winner."""
    rounds = [blocks - gone for gone in range(first, last)]
    most = sum(left * (left - 1) / 2 for left in rounds)
    return _Work(most + blocks, RACED * most + blocks, RACED * sum(rounds) + len(rounds))


def _sleb(blocks: int, first: int, last: int, _: int) -> _Work:
    """The first and the last block are no candidates."""
    rounds = [blocks - gone for gone in range(first, last)]
    most = sum((left - 2) * (left - 1) for left in rounds)
    return _Work(most, most, sum(left - 2 for left in rounds))


def _anneal(blocks: int, first: int, last: int, steps: int) -> _Work:
    """A swap changes two places: of `left` layers two thirds lie behind the first of them, on average."""
    start, left = _greedy(blocks, first, last, steps), blocks - last
    return _Work(
        start.most + steps * left, start.likely + ANNEALED * steps * left * 2 / 3, start.losses + ANNEALED * steps
    )


def _perplexity(blocks: int, first: int, last: int, _: int) -> _Work:
    left = blocks - first
    most = left * (left - 1) / 2 + left
    return _Work(most, most, left)


def _one_pass(blocks: int, first: int, last: int, _: int) -> _Work:
    return _Work(blocks, blocks, 0)


def _none(blocks: int, first: int, last: int, _: int) -> _Work:
    return _Work(0, 0, 0)


_WORK: dict[str, Callable[[int, int, int, int], _Work]] = {
    "anneal": _anneal,
    "cosine": _one_pass,
    "greedy": _greedy,
    "perplexity": _perplexity,
    "random": _none,
    "sleb": _sleb,
    "streamline": _one_pass,
}
