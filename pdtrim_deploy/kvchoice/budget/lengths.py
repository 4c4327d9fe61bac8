"""Effects and divergence as means over prompts of several lengths.

Harm is a quadratic form at each length, and so is its mean: the solver sees one form, whatever the number of lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdtrim_deploy.kvchoice.base import Problem, Progress, Sends
from pdtrim_deploy.kvchoice.budget.effects import Effects, Measure
from pdtrim_deploy.plan import KVSend


@dataclass(frozen=True)
class MeanMeasure:
    """A `Measure` for each of a problem's prompt lengths, which all count alike."""

    problem: Problem
    measures: tuple[Measure, ...]

    @classmethod
    def of(cls, problem: Problem, options: Sequence[KVSend], progress: Progress) -> MeanMeasure:
        """Of the problem and of those with longer prompts."""
        return cls(problem, tuple(Measure(each, options, progress) for each in (problem, *problem.longer)))

    @property
    def options(self) -> tuple[KVSend, ...]:
        """The options of each layer."""
        return self.measures[0].options

    def divergence(self, plan: Sends) -> float:
        """KL(dense || plan), nats a token, exact."""
        return sum(measure.divergence(plan) for measure in self.measures) / len(self.measures)

    def about(self, context: Sends) -> Effects:
        """As `Measure.about`."""
        first, *others = (measure.about(context) for measure in self.measures)
        if not others:
            return first
        count = len(self.measures)
        error = (first.error + sum(other.error for other in others)) / count
        linear = sum((other.linear for other in others), first.linear) / count
        return Effects(context, self.options, error, linear, sum((other.gram for other in others), first.gram) / count)
