"""Two models' answers to the same questions, compared as pairs."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def mcnemar(first: Sequence[int], second: Sequence[int]) -> float:
    """Two-sided exact p of McNemar's test: of questions that one alone got right, half are each model's by chance.

    Of several questions about one text, which are not independent, each model's number of right answers: of the texts
    of which one got more right, half are each model's by chance.
    """
    won, lost = (sum(a > b for a, b in zip(*sides, strict=True)) for sides in ((first, second), (second, first)))
    tail = sum(comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost)
    return min(1.0, 2 * tail)
