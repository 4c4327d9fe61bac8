"""Selection by measured harm (ours; the paper ranks layers by attention mass).

Harm is KL(all prompt KV || plan) of decode's next-token distribution: the expected rise of NLL on tokens drawn from the
uncut model. It has no label noise, so its standard error is several times smaller than that of the NLL on text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.kvchoice.base import Cut, Problem, Progress, Sends
from pdtrim_deploy.kvchoice.budget.lengths import MeanMeasure
from pdtrim_deploy.kvchoice.budget.search import BudgetSearch
from pdtrim_deploy.plan import KVSend


@dataclass(frozen=True)
class ByMeasuredHarm:
    """Cut the `sparse_layers` layers whose cuts together do least harm; one rule for all of them."""

    cut: Cut
    sparse_layers: int

    def choose(self, problem: Problem, progress: Progress) -> Sends:
        """Solve with cost 1 for a full layer and 0 for a cut one."""
        if self.sparse_layers > problem.layers:
            raise UserError(
                f"sparse_layers is {self.sparse_layers} but decode keeps {problem.layers} layers; "
                f"choose at most {problem.layers}"
            )
        if self.sparse_layers > (cuttable := problem.layers - sum(problem.windowed)):
            raise UserError(
                f"sparse_layers is {self.sparse_layers} but {cuttable} of decode's layers attend to all tokens, and a "
                f"window's rows cannot be cut; choose at most {cuttable}"
            )
        measure = MeanMeasure.of(problem, (self.cut.full, self.cut.sparse), progress)
        costs = np.array([[1, 1] if windowed else [1, 0] for windowed in problem.windowed])
        return BudgetSearch(measure, costs, progress).within(problem.layers - self.sparse_layers).sends


@dataclass(frozen=True)
class ByBudget:
    """Choose rows and wire dtype of each layer: least harm within a byte budget, or fewest bytes within a harm.

    Attributes:
        options: the options of each layer.
        reduction: dense over planned bytes to reach at each of the problem's prompt lengths; or None.
        max_loss: relative rise of perplexity to stay below, on the problem's text; or None.

    """

    options: tuple[KVSend, ...]
    reduction: float | None = None
    max_loss: float | None = None

    def choose(self, problem: Problem, progress: Progress) -> Sends:
        """UserError: no choice of the options meets the budget."""
        search = budget_search(problem, self.options, progress)
        if self.max_loss is not None:
            result = search.cheapest(math.log1p(self.max_loss))
            if result is None:
                raise UserError(
                    f"no plan loses at most {self.max_loss:.2%}, whatever its size; allow a larger max_loss, "
                    f"or 'native' among the wire dtypes"
                )
            return result.sends
        assert self.reduction is not None
        dense = problem.oracle.plan.dense_bytes(problem.prompt_tokens)
        return search.within(int(dense / self.reduction)).sends


def budget_search(problem: Problem, options: tuple[KVSend, ...], progress: Progress, rounds: int = 2) -> BudgetSearch:
    """A search among those `options` that suit the head size, whose costs are bytes at the problem's prompt length.

    With several lengths an option costs as much as its largest share of dense bytes at any of them, so that a plan that
    fits the budget at the first length has the reduction at all.
    """
    plan = problem.oracle.plan
    options = tuple(option for option in options if plan.model.suits(option))
    of_option = [plan.with_kv((option,) * problem.layers) for option in options]
    layers = range(problem.layers)
    costs = np.array([[plan.layer_cost(layer, problem.prompts) for plan in of_option] for layer in layers])
    return BudgetSearch(MeanMeasure.of(problem, options, progress), costs, progress, rounds)
