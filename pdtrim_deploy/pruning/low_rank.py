"""A change to a linear map with few unknowns, for text too short to fit a whole one: a diagonal and a low rank.

The diagonal gives each output of the present map its own factor. The low rank is that of reduced-rank regression: of
the ridge solution, the directions of outputs in which it moves most. Both are fitted in closed form from the same
normal equations as the whole map; a rank costs `in + out` unknowns, the whole map `in` for each output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_deploy.recipe.healing import TOKENS_A_FEATURE


@dataclass(frozen=True)
class Equations:
    """Normal equations of a change `[in, out]`, and the sum of squared errors without it, over some tokens.

    Attributes:
        gram, cross: float64 `[in, in]` and `[in, out]`, of features with features and with what is missing.

    """

    gram: Tensor
    cross: Tensor
    error: float

    def __add__(self, other: Equations) -> Equations:
        """Over both tokens."""
        return Equations(self.gram + other.gram, self.cross + other.cross, self.error + other.error)

    def after(self, change: Tensor) -> Equations:
        """What is left once `change` is made."""
        moved = self.gram @ change
        lowered = 2 * (change * self.cross).sum() - (change * moved).sum()
        return Equations(self.gram, self.cross - moved, self.error - float(lowered))

    def ridge(self, penalty: float) -> Tensor:
        """The best change `[in, out]` with a penalty in units of the mean squared feature times the tokens.

        None where all features are zero: no change does anything.
        """
        if not self.gram.any():
            return torch.zeros_like(self.cross)
        eye = torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device)
        regular = self.gram + penalty * self.gram.diagonal().mean() * eye
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(regular))


def most_rank(tokens: int, features: int, outputs: int) -> int:
    """The largest rank with `TOKENS_A_FEATURE` tokens for each unknown that an output has on average."""
    return min(features, outputs, tokens * outputs // (TOKENS_A_FEATURE * (features + outputs)))


def low_rank_change(
    fit: Equations, check: Equations, weight: Tensor, rank: int, penalties: Sequence[float]
) -> tuple[Tensor, float]:
    """The change `[in, out]` to `weight` `[out, in]`, of `rank` at most, and the error on `check` by what `fit` gives.

    Penalty and rank (0: the diagonal alone) are those with the least error on `check`; the change is then fitted to
    both. No change where none lowers that error.
    """
    weight = weight.T.to(fit.gram.dtype)
    best, chosen = check.error, (0.0, 0)
    for penalty in penalties:
        diagonal, moves, directions = parts(fit, weight, penalty)
        left = check.after(diagonal)
        lowered = 2 * (moves * (left.cross @ directions)).sum(0) - (moves * (left.gram @ moves)).sum(0)
        errors = left.error - torch.cat((lowered.new_zeros(1), lowered[:rank].cumsum(0)))
        if (error := float(errors.min())) < best:
            best, chosen = error, (penalty, int(errors.argmin()))
    penalty, rank = chosen
    if not penalty:
        return torch.zeros_like(weight), best
    diagonal, moves, directions = parts(fit + check, weight, penalty)
    return diagonal + moves[:, :rank] @ directions[:, :rank].T, best


def parts(equations: Equations, weight: Tensor, penalty: float) -> tuple[Tensor, Tensor, Tensor]:
    """A change to `weight` `[in, out]`: by a factor for each output `[in, out]`, then what is best added to that.

    The latter in `moves` `[in, out]` along orthonormal `directions` of outputs `[out, out]`, both by columns, largest
    first: of rank r it is `moves[:, :r] @ directions[:, :r].T`.
    """
    power = (weight * (equations.gram @ weight)).sum(0)
    along = (weight * equations.cross).sum(0)
    diagonal = weight * torch.where(power > 0, along / (power * (1 + penalty)), 0.0)
    left = equations.after(diagonal)
    change = left.ridge(penalty)
    _, directions = torch.linalg.eigh(change.T @ (left.gram @ change))
    directions = directions.flip(1)
    return diagonal, change @ directions, directions
