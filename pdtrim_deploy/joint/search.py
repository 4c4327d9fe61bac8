"""Solve for a target, measure the best few answers, measure effects about the best, solve again.

A target that no choice meets is lowered to the nearest that some choice meets. Two things may be out of reach. A saving
may be larger than any choice has it: it is lowered to the largest there is. And all savings together may cost more than
the target's loss: then all are lowered by the same share of themselves until the loss holds, as measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.joint.choice import Choices
from pdtrim_deploy.joint.costs import BUDGETS, CostTable
from pdtrim_deploy.joint.effects import JointMeasure
from pdtrim_deploy.joint.solve import FeatureQuadratic, Floats, Space, solve
from pdtrim_deploy.kvchoice.base import Progress
from pdtrim_deploy.recipe.target import TargetSection, goals_text

FINALISTS = 4  # answers of a solution that are measured
TRUSTED = 0.2  # relative error of the predicted harm below which effects are not measured again
_HALVINGS = 6  # of the share by which savings are lowered
_BELOW = 1e-9  # of a limit that is the least cost itself, which sums in another order may pass


@dataclass(frozen=True)
class JointResult:
    """Choices, what they cost by budget as shares of the whole model's, and KL in nats a token."""

    choices: Choices
    ratios: Mapping[str, float]
    predicted: float
    measured: float

    @property
    def loss(self) -> float:
        """Perplexity over the unpruned model's that the measured KL stands for."""
        return math.exp(self.measured)


@dataclass(frozen=True)
class Outcome:
    """The answer to a target.

    Attributes:
        taken: the goals that the answer was made for: the target's, or the nearest in reach.
        sentence: what was lowered and why; empty where nothing was.

    """

    result: JointResult
    taken: Mapping[str, float]
    sentence: str


class JointSearch:
    """Answers targets on one problem; effects about a context are measured once."""

    def __init__(
        self, measure: JointMeasure, table: CostTable, progress: Progress, *, rounds: int = 2, kicks: int = 20
    ) -> None:
        self.measure, self.table, self.rounds, self.kicks, self._progress = measure, table, rounds, kicks, progress
        self.space = Space(measure.parts, table.costs(measure.options))
        self._context = measure.dense
        self._harms: dict[Choices, float] = {}

    def answer(self, target: TargetSection) -> Outcome:
        """The least harmful choice that meets the target's savings; the nearest, where none does."""
        goals, sentences = self._goals(target), list[str]()
        least = dict(zip(BUDGETS, (self.space.least + self.table.fixed).tolist(), strict=True))
        reach = {name: max(value, least[name]) for name, value in goals.items()}
        if lowered := {name for name in goals if reach[name] > goals[name]}:
            parts = [f"{name} {_shown(name, goals[name])}, at best {_shown(name, least[name])}" for name in lowered]
            if target.goals.keys() & lowered:
                sentences.append(f"no choice reaches {'; '.join(sorted(parts))}")
        share, result = 1.0, self._within(self._limits(reach, 1.0), self.rounds)
        limit = math.inf if target.loss is None else math.log(target.loss)
        if result is None or result.measured > limit:
            short = "the savings together are out of reach" if result is None else (
                f"they cost {result.loss:.3f} times the perplexity where loss is {target.loss}"
            )  # fmt: skip
            share, result = self._nearest(reach, limit)
            if target.goals.keys() - {"loss"}:
                sentences.append(f"{short}: {share:.0%} of each saving is taken")
        if result.measured > limit:
            sentences.append("no choice has so small a loss, not even with nothing left out")
        taken = {name: 1 - share * (1 - value) for name, value in reach.items()}
        taken = {name: 1 / value if name == "kv" else value for name, value in taken.items()}
        if target.loss is not None:
            taken["loss"] = max(target.loss, result.loss)
        if sentences:
            sentences.append(f"the plan is made for {goals_text(taken)} in place of {target}")
        return Outcome(result, taken, "; ".join(sentences))

    def _goals(self, target: TargetSection) -> dict[str, float]:
        """Shares of the whole model's costs; a loss alone asks for all three at their least."""
        goals = {name: value for name, value in target.goals.items() if name != "loss"}
        if not goals:
            return dict.fromkeys(BUDGETS, 0.0)
        return {name: 1 / value if name == "kv" else value for name, value in goals.items()}

    def _limits(self, goals: Mapping[str, float], share: float) -> Floats:
        limits = np.array([1 - share * (1 - goals[name]) if name in goals else np.inf for name in BUDGETS])
        return limits - self.table.fixed + _BELOW

    def _nearest(self, goals: Mapping[str, float], limit: float) -> tuple[float, JointResult]:
        """The largest share of all savings whose measured harm is at most `limit`, to 1 in 64, and its result."""
        low, high, best = 0.0, 1.0, None
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            result = self._within(self._limits(goals, middle), 0)
            if result is not None and result.measured <= limit:
                low, best = middle, result
            else:
                high = middle
        if best is None:
            choices = (self.measure.options[0],) * len(self.measure.dense)  # whole, in the first rule that is allowed
            best = JointResult(choices, self.table.ratios(choices), 0.0, self.measure.divergence(choices))
        elif (again := self._within(self._limits(goals, low), self.rounds)) and again.measured < best.measured:
            best = again
        return low, best

    def _within(self, limits: Floats, rounds: int) -> JointResult | None:
        """The least harmful choice by measurement; None where none within the limits was reached."""
        best = self._solved(self._context, limits)
        for _ in range(rounds if best is not None else 0):
            if best is None or abs(best.predicted - best.measured) <= TRUSTED * best.measured:
                break
            result = self._solved(best.choices, limits)
            if result is None or result.measured >= best.measured:
                break
            best, self._context = result, best.choices
        return best

    def _solved(self, context: Choices, limits: Floats) -> JointResult | None:
        effects = self.measure.about(context)
        model = FeatureQuadratic(effects.error, effects.linear, effects.gram, self.space.parts)
        answers = solve(model, self.space, limits, self.kicks, self.measure.problem.seed, FINALISTS)
        results = list[JointResult]()
        for answer in answers:
            choices = tuple(self.measure.options[option] for option in answer)
            if choices not in self._harms:
                self._harms[choices] = self.measure.divergence(choices)
            harm = self._harms[choices]
            if not math.isfinite(harm):
                raise UserError("the KL of a plan is not a number; load the model in float32, check its weights")
            results.append(JointResult(choices, self.table.ratios(choices), model.harm(answer), harm))
        if not results:
            return None
        best = min(results, key=lambda result: result.measured)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in best.ratios.items())
        self._progress(f"{shown}: KL {best.predicted:.4f} predicted, {best.measured:.4f} measured")
        return best


def _shown(name: str, share: float) -> str:
    return f"{1 / share:.4g}" if name == "kv" and share else f"{share:.4g}"
