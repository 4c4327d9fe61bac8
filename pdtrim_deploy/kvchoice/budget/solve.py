"""Choose one option per layer: least squared length of the summed effects within a number of bytes.

A quadratic knapsack of a few hundred variables. Local search over single changes and pairs of changes (give one layer
less, another more), from a greedy start, with seeded kicks: each step evaluates all pairs at once, in milliseconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
KICKED = 4  # layers changed by a kick


class Quadratic:
    """`harm(choice) = (error + 2 linear[choice] + gram[choice, choice]) / 2`; arrays as in `Effects`."""

    def __init__(self, error: float, linear: Floats, gram: Floats) -> None:
        self.error, self.linear, self.gram = error, linear, gram
        self.layers, self.options = linear.shape
        self.squares = np.einsum("lolo->lo", gram)

    def harm(self, choice: Ints) -> float:
        """Nats a token."""
        at = np.arange(self.layers)
        picked = self.gram[at, choice][:, at, choice]
        return float(self.error + 2 * self.linear[at, choice].sum() + picked.sum()) / 2

    def slope(self, choice: Ints) -> Floats:
        """`[layers, options]`: each effect times the present error."""
        return self.linear + self.gram[:, :, np.arange(self.layers), choice].sum(2)

    def single(self, choice: Ints) -> Floats:
        """`[layers, options]`: what changing one layer adds to the harm."""
        at, slope = np.arange(self.layers), self.slope(choice)
        length = self.squares + self.squares[at, choice][:, None] - 2 * self._with_chosen(choice)
        return slope - slope[at, choice][:, None] + length / 2

    def cross(self, choice: Ints) -> Floats:
        """`[layers, options, layers, options]`: what a pair of changes adds beyond the two single ones."""
        at = np.arange(self.layers)
        to_chosen = self.gram[:, :, at, choice]  # [l, o, m]
        both = self.gram - to_chosen[..., None] - to_chosen.transpose(2, 0, 1)[:, None]
        return both + self.gram[at, choice][:, at, choice][:, None, :, None]

    def _with_chosen(self, choice: Ints) -> Floats:
        at = np.arange(self.layers)
        return self.gram[at, :, at, choice]


def solve(model: Quadratic, costs: Ints, budget: int, kicks: int = 30, seed: int = 0) -> Ints:
    """int64 `[layers]`: the option of each layer.

    Args:
        costs: int64 `[layers, options]`, bytes.
        budget: the sum of the chosen costs is at most this; at least that of the cheapest options.
        kicks: restarts from the best choice with a few layers changed at random.

    """
    random = np.random.default_rng(seed)
    best = _descend(model, costs, budget, _greedy(model, costs, budget))
    least = model.harm(best)
    for _ in range(kicks):
        tried = best.copy()
        for layer in random.choice(model.layers, min(KICKED, model.layers), replace=False):
            tried[layer] = random.integers(model.options)
        tried = _descend(model, costs, budget, _fit(model, costs, budget, tried))
        if (harm := model.harm(tried)) < least - 1e-12:
            best, least = tried, harm
    return best


def _greedy(model: Quadratic, costs: Ints, budget: int) -> Ints:
    """Start with each layer's least harmful option; make the change with least harm per byte saved until it fits."""
    return _fit(model, costs, budget, model.squares.argmin(1))


def _fit(model: Quadratic, costs: Ints, budget: int, choice: Ints) -> Ints:
    at, choice = np.arange(model.layers), choice.copy()
    while (over := costs[at, choice].sum() - budget) > 0:
        saved = costs[at, choice][:, None] - costs
        rate = np.where(saved > 0, model.single(choice) / np.minimum(np.maximum(saved, 1), over), np.inf)
        layer, option = np.unravel_index(rate.argmin(), rate.shape)
        choice[layer] = option
    return choice


def _descend(model: Quadratic, costs: Ints, budget: int, choice: Ints) -> Ints:
    """Make the best change of one or two layers while the computed harm falls, since rounding may predict a fall."""
    at, choice, harm = np.arange(model.layers), choice.copy(), model.harm(choice)
    same = np.eye(model.layers, dtype=bool)[:, None, :, None]
    while True:
        spare = budget - costs[at, choice].sum()
        more = costs - costs[at, choice][:, None]
        single = model.single(choice)
        alone = np.where(more <= spare, single, 0.0)
        pair = single[:, :, None, None] + single[None, None] + model.cross(choice)
        pair = np.where((more[:, :, None, None] + more[None, None] <= spare) & ~same, pair, 0.0)
        if min(alone.min(), pair.min()) > -1e-12:
            return choice
        changed = choice.copy()
        if alone.min() <= pair.min():
            layer, option = np.unravel_index(alone.argmin(), alone.shape)
            changed[layer] = option
        else:
            first, a, second, b = np.unravel_index(pair.argmin(), pair.shape)
            changed[first], changed[second] = a, b
        if (less := model.harm(changed)) > harm - 1e-12:
            return choice
        choice, harm = changed, less
