"""Losses from a part of the vocabulary: likely tokens, and some of the others, each of which stands for several.

The LM head is a third of what a candidate costs: of SmolLM2-135M as much as 8 of its 30 blocks. To compare candidates,
the logarithm of the sum over all tokens may be an estimate, as long as it is the same tokens' for all of them: what the
estimate errs by is nearly the same for all, and goes when losses are subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pdtrim_deploy.models.blockwise import Blockwise

LIKELY = 32  # of each position
OTHERS = 2048
_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class VocabularySample:
    """Tokens that stand for the whole vocabulary, ascending, on the device of the LM head.

    Attributes:
        tokens: int64 `[n]`.
        weights: float32 `[n]`, the logarithm of how many tokens each stands for.

    """

    tokens: Tensor
    weights: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, runner: Blockwise, hidden: Tensor, targets: Tensor) -> VocabularySample | None:
        """All `targets` `[b, t]`, the likeliest tokens behind last states `hidden` `[b, t, hidden]`, and some others.

        None where these would be more than half of the vocabulary, or the LM head is more than a matrix.
        """
        head = runner.model.lm_head
        if type(head) is not nn.Linear or head.out_features <= 2 * OTHERS:
            return None
        certain = torch.zeros(head.out_features, dtype=torch.bool, device=runner.home)
        certain[targets.flatten().to(runner.home)] = True
        for part in hidden.flatten(0, 1).split(runner.logits_step):
            certain[runner.logits(part).topk(LIKELY).indices.flatten()] = True
        others, stride = int(certain.logical_not().sum()), head.out_features // OTHERS
        grid = torch.arange(stride // 2, head.out_features, stride, device=runner.home)
        kept = grid[~certain[grid]]  # of fixed places: a token more or less that is certain moves no other
        if not len(kept) or 2 * (head.out_features - others + len(kept)) > head.out_features:
            return None
        weights = torch.zeros(head.out_features, device=runner.home)
        weights[kept] = torch.tensor(others / len(kept)).log()
        certain[kept] = True
        tokens = certain.nonzero()[:, 0]
        return cls(tokens, weights[tokens])

    @torch.no_grad()
    def logprobs(self, runner: Blockwise, hidden: Tensor, targets: Tensor) -> Tensor:
        """float32 `[b, t]`: about the log-probability of `targets[b, t]`, each in `tokens`, after `hidden[b, t]`."""
        head = runner.model.lm_head
        weight, bias = head.weight[self.tokens], None if head.bias is None else head.bias[self.tokens]
        at = torch.searchsorted(self.tokens, targets.flatten().to(runner.home))
        parts, step = list[Tensor](), max(1, _LOGITS_AT_ONCE // len(self.tokens))
        for part, columns in zip(hidden.flatten(0, 1).split(step), at.split(step), strict=True):
            logits = nn.functional.linear(runner.normed(part), weight, bias).float()
            if runner.logits_scaling is not None:
                logits = logits / runner.logits_scaling
            chosen = logits.gather(-1, columns[:, None])[:, 0]
            parts.append(chosen - (logits + self.weights).logsumexp(-1))
        return torch.cat(parts).view(targets.shape)
