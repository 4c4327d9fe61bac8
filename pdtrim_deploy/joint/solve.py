"""Choose an option for each block: least squared length of the summed effects within several budgets.

An option is a sum of *features*: what prefill does, what decode does, which rows travel, in which dtype. Effects and
their inner products are those of features, so that a few hundred of them stand for thousands of options. Local search
over single changes and pairs of changes, from a greedy start, with seeded kicks. Pairs are tried among a shortlist:
each block's best options at several exchange rates between harm and each budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
KICKED = 3  # blocks changed by a kick
SHORTLIST = 320  # moves of which all pairs are tried
_RATES = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the mean harm a unit of budget, at which options are shortlisted
_LEAST = 1e-12


@dataclass(frozen=True)
class Space:
    """What may be chosen.

    Attributes:
        parts: float64 `[options, features]`, 1 where an option has a feature, else 0.
        costs: float64 `[blocks, options, budgets]`; infinite in every budget where a block has no such option.

    """

    parts: Floats
    costs: Floats

    @cached_property
    def allowed(self) -> NDArray[np.bool_]:
        """`[blocks, options]`."""
        return np.asarray(np.isfinite(self.costs).all(-1))

    def cost(self, choice: Ints) -> Floats:
        """`[budgets]` of a choice."""
        return np.asarray(self.costs[np.arange(len(choice)), choice].sum(0))

    @property
    def least(self) -> Floats:
        """`[budgets]`, each at its lowest by itself."""
        return np.asarray(self.costs.min(1).sum(0))


class FeatureQuadratic:
    """`harm = (error + 2 linear[x] + x gram x) / 2` of the features x of all blocks, nats a token.

    Args:
        error: twice the harm of the context that effects are counted from.
        linear: float64 `[blocks, features]`.
        gram: float64 `[blocks, features, blocks, features]`.
        parts: as in `Space`.

    """

    def __init__(self, error: float, linear: Floats, gram: Floats, parts: Floats) -> None:
        self.error, self.linear, self.gram, self.parts = error, linear, gram, parts
        blocks = np.arange(len(linear))
        of_block = gram[blocks, :, blocks]  # [blocks, features, features]
        products = parts @ of_block @ parts.T
        own = np.einsum("boo->bo", products)
        self._distance = own[:, :, None] + own[:, None] - products - products.transpose(0, 2, 1)

    def harm(self, choice: Ints) -> float:
        """Nats a token."""
        x = self.parts[choice]
        return float(self.error + 2 * (self.linear * x).sum() + np.einsum("bf,bfcg,cg->", x, self.gram, x)) / 2

    def single(self, choice: Ints) -> Floats:
        """`[blocks, options]`: what changing one block adds to the harm."""
        blocks, features = self.linear.shape
        x = self.parts[choice].reshape(-1)
        slope = self.linear + (self.gram.reshape(-1, blocks * features) @ x).reshape(blocks, features)
        along = slope @ self.parts.T
        at = np.arange(blocks)
        return np.asarray(along - along[at, choice][:, None] + self._distance[at, :, choice] / 2)

    def cross(self, choice: Ints, blocks: Ints, options: Ints) -> Floats:
        """`[moves, moves]`: what a pair of the moves `blocks` -> `options` adds beyond the two single ones."""
        steps = np.zeros((len(blocks), *self.linear.shape))
        steps[np.arange(len(blocks)), blocks] = self.parts[options] - self.parts[choice[blocks]]
        flat = steps.reshape(len(blocks), -1)
        return np.asarray(flat @ self.gram.reshape(flat.shape[1], -1) @ flat.T)


def solve(
    model: FeatureQuadratic, space: Space, limits: Floats, kicks: int = 20, seed: int = 0, count: int = 1
) -> list[Ints]:
    """The best choices that the search came to, each int64 `[blocks]`, best first, at most `count`.

    Empty where no choice within the limits was reached. Equal seeds give equal answers.

    Args:
        limits: float64 `[budgets]`, what the chosen costs sum up to at most; infinite: no limit.

    """
    random = np.random.default_rng(seed)
    at = np.arange(len(space.costs))
    kinder = np.where(space.allowed, model.single(_first(space)), np.inf)
    start = _within(model, space, limits, kinder.argmin(1))
    if start is None:
        return []
    best = _descend(model, space, limits, start)
    reached = {tuple(best): model.harm(best)}
    for _ in range(kicks):
        changed = best.copy()
        for block in random.choice(at, min(KICKED, len(at)), replace=False):
            changed[block] = random.choice(np.flatnonzero(space.allowed[block]))
        repaired = _within(model, space, limits, changed)
        if repaired is None:
            continue
        changed = _descend(model, space, limits, repaired)
        reached[tuple(changed)] = model.harm(changed)
        if reached[tuple(changed)] < reached[tuple(best)] - _LEAST:
            best = changed
    ranked = sorted(reached, key=lambda choice: (reached[choice], choice))
    return [np.array(choice) for choice in ranked[:count]]


def _first(space: Space) -> Ints:
    """Each block's first option that it has."""
    return np.asarray(space.allowed.argmax(1))


def _within(model: FeatureQuadratic, space: Space, limits: Floats, choice: Ints) -> Ints | None:
    """Change one block at a time, with least harm for what it brings towards the limits; None: none leads there."""
    choice, scale = choice.copy(), np.where(np.isfinite(limits), np.maximum(np.abs(limits), _LEAST), 1.0)
    at = np.arange(len(choice))
    while True:
        total = space.cost(choice)
        over = np.maximum(total - limits, 0.0) / scale
        if over.max(initial=0.0) <= _LEAST:
            return choice
        after = np.where(space.allowed[..., None], total - space.costs[at, choice][:, None] + space.costs, total)
        gain = over.sum() - (np.maximum(after - limits, 0.0) / scale).sum(-1)
        helps = space.allowed & (gain > _LEAST)
        if not helps.any():
            return None
        rate = np.where(helps, model.single(choice) / np.where(helps, gain, 1.0), np.inf)
        block, option = np.unravel_index(rate.argmin(), rate.shape)
        choice[block] = option


def _descend(model: FeatureQuadratic, space: Space, limits: Floats, choice: Ints) -> Ints:
    """Make the best change of one or two blocks while the computed harm falls, since rounding may predict a fall."""
    choice, harm, at = choice.copy(), model.harm(choice), np.arange(len(choice))
    room = limits + 1e-9 * np.where(np.isfinite(limits), np.maximum(np.abs(limits), 1.0), 0.0)
    while True:
        single = np.where(space.allowed, model.single(choice), np.inf)
        total = space.cost(choice)
        more = np.where(space.allowed[..., None], space.costs - space.costs[at, choice][:, None], 0.0)
        fits = space.allowed & (total + more <= room).all(-1)
        alone = np.where(fits, single, 0.0)
        blocks, options = _shortlist(single, more, choice, space.allowed)
        moves = single[blocks, options]
        pair = moves[:, None] + moves[None] + model.cross(choice, blocks, options)
        both = more[blocks, options]
        fit = (total + both[:, None] + both[None] <= room).all(-1) & (blocks[:, None] != blocks[None])
        pair = np.where(fit, pair, 0.0)
        if min(alone.min(), pair.min(initial=0.0)) > -_LEAST:
            return choice
        changed = choice.copy()
        if alone.min() <= pair.min(initial=0.0):
            block, option = np.unravel_index(alone.argmin(), alone.shape)
            changed[block] = option
        else:
            first, second = np.unravel_index(pair.argmin(), pair.shape)
            changed[blocks[[first, second]]] = options[[first, second]]
        if (less := model.harm(changed)) > harm - _LEAST:
            return choice
        choice, harm = changed, less


def _shortlist(single: Floats, more: Floats, choice: Ints, allowed: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Moves that may be half of a good pair, as blocks and options: all, where these are few."""
    moves = allowed.copy()
    moves[np.arange(len(choice)), choice] = False
    if moves.sum() <= SHORTLIST:
        blocks, options = np.nonzero(moves)
        return blocks, options
    harm = np.where(moves, single, np.inf)
    picked = np.zeros_like(moves)
    at = np.arange(len(choice))
    picked[at, harm.argmin(1)] = True
    for budget in range(more.shape[-1]):
        cost = more[..., budget]
        spread = np.abs(cost[moves]).mean()
        if spread <= _LEAST:
            continue
        unit = np.median(np.abs(single[moves])) / spread
        for rate in _RATES:
            picked[at, np.where(moves, single + rate * unit * cost, np.inf).argmin(1)] = True
    if more.shape[-1] > 1:  # what saves in all budgets together
        together = (more / np.maximum(np.abs(more).max((0, 1)), _LEAST)).sum(-1)
        unit = np.median(np.abs(single[moves])) / max(float(np.abs(together[moves]).mean()), _LEAST)
        for rate in _RATES:
            picked[at, np.where(moves, single + rate * unit * together, np.inf).argmin(1)] = True
    blocks, options = np.nonzero(picked & moves)
    if len(blocks) > SHORTLIST:
        keep = np.argsort(single[blocks, options], kind="stable")[:SHORTLIST]
        blocks, options = blocks[keep], options[keep]
    return blocks, options
