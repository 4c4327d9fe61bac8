"""How far apart two predictions are, to second order, without their logits.

KL(p || p') = d^T F d / 2 + O(|d|^3) for a change d of the normed last hidden state, F = W^T (diag p - p p^T) W. F is
the covariance of rows of the output embedding W under p, so a few tokens drawn from p stand for it:
F ~ A^T A, A the drawn rows less their mean, over sqrt(draws). What is kept of a change is A d, and all inner products
of changes are those of KL's quadratic form; a token costs `draws` x `hidden` instead of `vocabulary` x `hidden`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.recipe.kv_cost import LOGITS_AT_ONCE


class Probe:
    """The quadratic form of KL about the predictions that follow `reference`.

    Args:
        runner: the decode model.
        reference: last block's output, `[batch, tokens, hidden]`, of the predictions that count as right.
        draws: tokens drawn for each position, with replacement.
        seed: of the draws.

    Raises:
        UserError: the predictions are not numbers.

    """

    def __init__(self, runner: Blockwise, reference: Tensor, draws: int, seed: int) -> None:
        self._norm = runner.model.model.norm
        weight, flat = runner.model.lm_head.weight, reference.flatten(0, 1)
        self._at = self._norm(flat)
        random = torch.Generator(reference.device).manual_seed(seed)
        self._rows = torch.empty(len(flat), draws, weight.shape[1])  # the largest thing here: exists once
        step = max(1, LOGITS_AT_ONCE // len(weight))
        for part, rows in zip(self._at.split(step), self._rows.split(step), strict=True):
            chance = runner.head(part).float().softmax(-1)
            if not chance.isfinite().all():
                raise UserError("the model's logits are not numbers; load it in float32 or check its weights")
            drawn = weight[torch.multinomial(chance, draws, replacement=True, generator=random)].float()
            torch.sub(drawn, (chance.to(weight.dtype) @ weight).float()[:, None], out=rows)
        self._rows /= draws**0.5 * (runner.logits_scaling or 1.0)  # W is what makes logits

    def change(self, hidden: Tensor) -> Tensor:
        """float32 `[batch * tokens * draws]`: `hidden`'s change against the reference; 2 KL is its squared length."""
        moved = (self._norm(hidden.flatten(0, 1)) - self._at).float()
        return torch.bmm(self._rows, moved[:, :, None]).flatten()
