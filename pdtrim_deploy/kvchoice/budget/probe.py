"""KL between two predictions, to second order, without their logits.

KL(p || p') = d^T F d / 2 + O(|d|^3) for a change d of the normed last hidden state, F = W^T (diag p - p p^T) W. F is
the covariance of rows of the output embedding W under p, so a few tokens drawn from p approximate it:
F ~ A^T A, where A has the drawn rows minus their mean, over sqrt(draws). A change is stored as A d, so inner products
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
        reference: last block's output, `[batch, tokens, hidden]`, of the reference predictions.
        draws: tokens drawn per position, with replacement.
        seed: of the draws.

    Raises:
        UserError: the predictions are not numbers.

    """

    def __init__(self, runner: Blockwise, reference: Tensor, draws: int, seed: int) -> None:
        self._normed, weight = runner.normed, runner.model.lm_head.weight
        self._at = self._normed(reference.flatten(0, 1))
        random = torch.Generator().manual_seed(seed)  # on the host: the same draws on every device
        # The largest tensor here: only one exists.
        self._rows = torch.empty(len(self._at), draws, weight.shape[1], device=weight.device)
        step = max(1, LOGITS_AT_ONCE // len(weight))
        for part, rows in zip(self._at.split(step), self._rows.split(step), strict=True):
            chance = runner.head(part).float().softmax(-1)
            if not chance.isfinite().all():
                raise UserError("the model's logits are not numbers; load it in float32 or check its weights")
            tokens = torch.multinomial(chance.cpu(), draws, replacement=True, generator=random)
            drawn = weight[tokens.to(weight.device)].float()
            torch.sub(drawn, (chance.to(weight.dtype) @ weight).float()[:, None], out=rows)
        self._rows /= draws**0.5 * (runner.logits_scaling or 1.0)  # W is what makes logits

    def change(self, hidden: Tensor) -> Tensor:
        """float32 `[batch * tokens * draws]`: `hidden`'s change against the reference; 2 KL is its squared length."""
        moved = (self._normed(hidden.flatten(0, 1)) - self._at).float()
        return torch.bmm(self._rows, moved[:, :, None]).flatten()
