"""Two models' answers to the same questions, compared as pairs."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact p of McNemar's test: of questions that one alone got right, half are each model's by chance."""
    pairs = list(zip(first, second, strict=True))
    won, lost = (sum(a and not b for a, b in turned) for turned in (pairs, [(b, a) for a, b in pairs]))
    tail = sum(comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost)
    return min(1.0, 2 * tail)
