"""What a measurement gives: a number for each item and measure, and the paired difference of two such results."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Paired:
    """Mean over `count` items of a difference (plan minus reference), and its standard error (nan for one subject).

    Both are weighted where the measure is: the error is that of a ratio of sums, to first order.
    """

    mean: float
    stderr: float
    count: int


@dataclass(frozen=True)
class Measured:
    """One plan's result: `values[measure][item]`; items of two results of one task are the same, in the same order.

    Items with the same number in `subjects` are of one document, or one text judged several times; left out, every item
    is its own.
    `higher_is_better` is of those measures alone whose source states it, `weights[measure][item]` (a text's words, say)
    of those whose mean is weighted.
    """

    task: str
    groups: tuple[str, ...]
    values: dict[str, tuple[float, ...]]
    subjects: tuple[int, ...] = ()
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def items(self, measure: str, group: str | None = None) -> list[float]:
        """One number per item, of one group or of all."""
        return self._of_group(self.values[measure], group)

    def mean(self, measure: str, group: str | None = None) -> float:
        """Mean over items, weighted where the measure is."""
        weights = self._weights(measure, group)
        return math.fsum(map(operator.mul, weights, self.items(measure, group))) / math.fsum(weights)

    def _weights(self, measure: str, group: str | None) -> list[float]:
        return self._of_group(self.weights.get(measure, (1.0,) * len(self.groups)), group)

    def _of_group(self, values: Sequence[float], group: str | None) -> list[float]:
        return [value for value, of in zip(values, self.groups, strict=True) if group in (None, of)]

    def against(self, reference: Measured, measure: str, group: str | None = None) -> Paired:
        """Item by item; for `nll` the exponential of the mean is the perplexity ratio.

        Subjects are independent of each other, items of one subject are not: it counts as a whole.
        """
        pairs = zip(self.items(measure, group), reference.items(measure, group), strict=True)
        differences, weights = [value - base for value, base in pairs], self._weights(measure, group)
        whole = math.fsum(weights)
        mean = math.fsum(map(operator.mul, weights, differences)) / whole
        numbered = zip(self.subjects or range(len(self.groups)), self.groups, strict=True)
        strayed: dict[int, float] = defaultdict(float)  # each subject's weighted sum of deviations from the mean
        subjects = (subject for subject, of in numbered if group in (None, of))
        for subject, weight, difference in zip(subjects, weights, differences, strict=True):
            strayed[subject] += weight * (difference - mean)
        free = len(strayed) - 1
        squares = math.fsum(d**2 for d in strayed.values())
        return Paired(mean, math.sqrt(squares * len(strayed) / free) / whole if free else math.nan, len(weights))

    def by_group(self, measure: str) -> dict[str, float]:
        """The mean of each group, in the order of first items."""
        return {group: self.mean(measure, group) for group in dict.fromkeys(self.groups)}
