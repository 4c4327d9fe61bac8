"""Block-forwards of judging the finalists of a search: what they need beyond the search itself. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from pdtrim_deploy.recipe.healing import HealingSection
from pdtrim_deploy.recipe.pruning import PruningSection


@dataclass(frozen=True)
class JudgingCost:
    """Of both stages' finalists, judged on the text of `healing`.

    Attributes:
        windows: block-forwards of looking for the best runs of adjacent blocks, at most.
        ranking: of the dense model's runs by which baselines choose.
        judged: block-forwards of compensating and judging, at most.
        judged_again: of judging decode's once more, behind where prefill's search began.
        refitted_tokens: layers refitted, times tokens that each is refitted on, at most.

    """

    windows: int
    ranking: int
    judged: int
    judged_again: int
    refitted_tokens: int

    @classmethod
    def of(cls, blocks: int, pruning: PruningSection, sequences: int, healing: HealingSection) -> JudgingCost:
        """Of a model of so many blocks whose search has `sequences` sequences of text."""
        lost, twice = (pruning.prefill_blocks, pruning.decode_blocks), healing.compensation == "norm"
        together = (pruning.blocks_in_memory or blocks) >= blocks
        count, texts, searches = pruning.judged, healing.judged, pruning.searches
        windows = 0 if pruning.decode_sublayers else _windows(blocks, *lost, sequences)
        judged = partial(judged_forwards, blocks, *lost, texts, twice=twice, searches=searches)
        return cls(
            windows=windows,
            ranking=len(pruning.baselines) * sum(searches) * blocks * sequences,
            judged=judged(count, count, together=together),
            judged_again=windows + judged(0, count, together=False),
            refitted_tokens=texts * _refitted(blocks, pruning, healing.length)
            if healing.compensation == "least-squares"
            else 0,
        )


def judged_forwards(
    blocks: int,
    prefill_lost: int,
    decode_lost: int,
    sequences: int,
    prefill_judged: int,
    decode_judged: int,
    together: bool = True,
    twice: bool = False,
    searches: tuple[bool, bool] | None = None,
) -> int:
    """Block-forwards of compensating and judging so many finalists of each stage (`refitted`), at most.

    Each sequence is fitted on once and judged on once. Fitting runs, where a layer is refitted, twice the stage; around
    it the dense model and, for decode, prefill, once for all finalists or, if they are not compensated `together`, for
    each. Judging runs both stages. Prefill is compensated once for all of decode's. What may be left out where it does
    not help (`norm`) is judged `twice`, with it and without; fitting it runs the dense model alone.

    `searches` says whether prefill was searched, and decode apart from it: where blocks keep one sublayer it is no
    matter of blocks lost.
    """
    prefill, decode, total = blocks - prefill_lost, blocks - decode_lost, 0
    prefill_searched, decode_searched = searches or (prefill_lost > 0, decode_lost > prefill_lost)
    if prefill_searched and prefill_judged:
        total += blocks * (1 if together else prefill_judged) + prefill_judged * (2 if twice else 3) * prefill
    if decode_searched and decode_judged:
        count = 1 if together else decode_judged
        if twice:
            total += (3 * blocks + 2 * prefill if prefill_searched else 0) + blocks * count
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
    prefill_searched, decode_searched = pruning.searches
    if prefill_searched:
        total += pruning.judged * (blocks - first) * length
    if decode_searched:
        total += prefill_searched * (blocks - first) * length + pruning.judged * (blocks - last) * (length // 2)
    return total
