"""Refit the last linear map of a block in closed form, so that the block ends where it should.

A block ends in `hidden + down_proj(activation)`. With everything before held fixed, the best `down_proj` is ridge
regression towards the present one: no gradients, one pass over text. (ReplaceMe, arXiv:2505.02819, fits a matrix
behind the MLP instead; the whole `down_proj` has ffn / hidden times as many degrees of freedom.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.layer_kv import LayerKV, Span
from pdtrim_deploy.pruning.low_rank import Equations, low_rank_change, most_rank
from pdtrim_deploy.recipe.healing import TOKENS_A_FEATURE

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties tried, in units of the mean squared activation times the number of tokens."""


class Ridge:
    """Normal equations of a change to one linear map, fed batch by batch. Memory: twice in x (in + out) in float64.

    They are on the device of what is fed; products are of float32 rows, whatever the model computes in.
    """

    def __init__(self, features: int, outputs: int, device: torch.device) -> None:
        # [fit, check]: what the penalty is chosen on is not what is fitted
        self.gram = [torch.zeros(features, features, dtype=torch.float64, device=device) for _ in range(2)]
        self.cross = [torch.zeros(features, outputs, dtype=torch.float64, device=device) for _ in range(2)]
        self.error, self.tokens = [0.0, 0.0], [0.0, 0.0]

    def add(self, features: Tensor, missing: Tensor, check: bool, share: float = 1.0) -> None:
        """`[tokens, in]` and what its map falls short of, `[tokens, out]`, both weighted; each token counts `share`."""
        features, missing = (rows.float() if share == 1 else share**0.5 * rows.float() for rows in (features, missing))
        self.gram[check] += features.T @ features  # a batch in float32, their sum in float64
        self.cross[check] += features.T @ missing
        self.error[check] += float(missing.double().square().sum())
        self.tokens[check] += share * len(missing)

    def solve(
        self, weight: Tensor, *, falls_back: bool = False, text_share: float = 1.0
    ) -> tuple[Tensor, float, float]:
        """The new weight `[out, in]` for `weight`, and the mean squared error on checked tokens before and after.

        It is `weight` itself when no penalty lowers that error, and when the errors are not numbers. Where it
        `falls_back`, fewer than `TOKENS_A_FEATURE` tokens a feature, of the text of which this is a `text_share`,
        change it by a diagonal and a low rank alone.
        """
        before = best = self.error[1] / self.tokens[1]
        ridge = 0.0
        if not math.isfinite(before + self.error[0]):
            return weight, math.nan, math.nan
        fit, check = (Equations(*part) for part in zip(self.gram, self.cross, self.error, strict=True))
        tokens, (outputs, features) = sum(self.tokens), weight.shape
        if falls_back and tokens < text_share * TOKENS_A_FEATURE * features:
            rank = most_rank(int(tokens), features, outputs)
            change, error = low_rank_change(fit, check, weight, rank, RIDGES)
            return weight + change.T.to(weight.dtype), before, error / self.tokens[1]
        for penalty in RIDGES:
            if (after := check.after(fit.ridge(penalty)).error / self.tokens[1]) < best:
                best, ridge = after, penalty
        if ridge:
            weight = weight + (fit + check).ridge(ridge).T.to(weight.dtype)
        return weight, before, best


class Refit:
    """Of one layer's `down_proj`: its error is relative to what should come out of the layer.

    Tokens weigh 1 / |target|^2: an attention sink's state is a hundred times longer than the others'.
    """

    _weight: Tensor

    def __init__(self, runner: Blockwise, layer: int) -> None:
        self.runner, self.layer = runner, layer
        self.down = runner.layers[layer].mlp.down_proj
        self.ridge = Ridge(self.down.in_features, self.down.out_features, runner.devices[layer])

    @torch.no_grad()
    def add(
        self,
        hidden: Tensor,
        span: Span,
        target: Tensor,
        check: bool,
        kv: LayerKV | None = None,
        *,
        share: float = 1.0,
    ) -> None:
        """One batch: the layer's input and what should come out, both `[batch, tokens, hidden]`.

        Each of its tokens counts `share`.
        """
        seen: list[Tensor] = []

        def look(down: Any, inputs: tuple[Tensor]) -> None:
            seen.append(inputs[0])
            self._weight = down.weight.detach()  # a streamed model has it only now

        hook = self.down.register_forward_pre_hook(look)
        try:
            out = self.runner.block(self.layer, hidden, span, kv)
        finally:
            hook.remove()
        target = target.to(out.device)
        weight = target.flatten(0, 1).norm(dim=-1, keepdim=True).reciprocal()
        self.ridge.add(seen[0].flatten(0, 1) * weight, (target - out).flatten(0, 1) * weight, check, share)

    def solve(self, *, falls_back: bool = False, text_share: float = 1.0) -> tuple[Tensor, float, float]:
        """As `Ridge.solve`."""
        return self.ridge.solve(self._weight, falls_back=falls_back, text_share=text_share)


def set_down(layer: Any, weight: Tensor) -> None:
    """Give `layer` (alone) this `down_proj`."""
    layer.mlp.down_proj._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
