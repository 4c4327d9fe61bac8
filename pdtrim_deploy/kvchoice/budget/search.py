"""Solve around a plan, measure the result, measure effects around it, solve again; return the best measured plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvchoice.base import Progress, Sends
from pdtrim_deploy.kvchoice.budget.lengths import MeanMeasure
from pdtrim_deploy.kvchoice.budget.solve import Ints, Quadratic, solve
from pdtrim_deploy.plan import KVSend

TRUSTED = 0.2  # relative error of the predicted harm below which effects are not measured again


@dataclass(frozen=True)
class BudgetResult:
    """A plan, its cost, and its KL from dense on the problem's text in nats a token, predicted and measured."""

    sends: Sends
    cost: int
    foretold: float
    harm: float


class BudgetSearch:
    """The least harmful plan within a budget of `costs`, for any number of budgets on one problem.

    Args:
        costs: int64 `[layers, options]`, the price of each of `measure.options` in each layer.
        rounds: how often, at most, effects are measured again around the best plan so far.

    """

    def __init__(self, measure: MeanMeasure, costs: Ints, progress: Progress, rounds: int = 2) -> None:
        self.measure, self.costs, self.rounds, self._progress = measure, costs, rounds, progress

    def within(self, budget: int) -> BudgetResult:
        """UserError: even the cheapest options cost more."""
        if budget < (least := int(self.costs.min(1).sum())):
            raise UserError(
                f"the budget is {budget} but the smallest options cost {least}; allow more, or add smaller ones"
            )
        best = self._solve((KVSend(),) * len(self.costs), budget)
        for _ in range(self.rounds):
            if abs(best.foretold - best.harm) <= TRUSTED * best.harm:
                break
            result = self._solve(best.sends, budget)
            if result.harm >= best.harm:
                break
            best = result
        return best

    def cheapest(self, harm: float, tolerance: float = 0.01) -> BudgetResult | None:
        """The cheapest plan found whose measured KL is at most `harm`; None when there is none.

        Bisects the budget (a smaller one never lowers the harm) to `tolerance` of the most expensive options' cost.
        """
        low, high = int(self.costs.min(1).sum()), int(self.costs.max(1).sum())
        best = self.within(high)  # first, because bisection never reaches it
        if best.harm > harm:
            return None
        high = best.cost
        while high - low > tolerance * high:
            middle = (low + high) // 2
            result = self.within(middle)
            if result.harm <= harm:
                best, high = result, min(middle, result.cost)
            else:
                low = middle
        return best

    def _solve(self, context: Sends, budget: int) -> BudgetResult:
        effects = self.measure.about(context)
        model = Quadratic(effects.error, effects.linear.numpy(), effects.gram.numpy())
        choice = solve(model, self.costs, budget, seed=self.measure.problem.seed)
        sends = tuple(self.measure.options[option] for option in choice)
        cost = int(self.costs[np.arange(len(choice)), choice].sum())
        result = BudgetResult(sends, cost, model.harm(choice), self.measure.divergence(sends))
        self._progress(f"budget {budget}: cost {cost}, KL {result.foretold:.5f} foretold, {result.harm:.5f} measured")
        return result
