"""What is trained and the dense model over the same text: what the losses of healing compare."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pdtrim_deploy.models.blockwise import Blockwise, CausalLM

_LOGITS_AT_ONCE = 1 << 23  # elements; half a dozen float32 tensors of that size exist at a time


class Reader(ABC):
    """What a stage, or both, make of text beside what the dense model does.

    Attributes:
        runner: of the model that is trained.

    """

    def __init__(self, dense: CausalLM, model: CausalLM) -> None:
        self.dense, self.runner = Blockwise(dense), Blockwise(model)

    @abstractmethod
    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states `[batch, tokens, hidden]` for `ids`, int64 `[batch, T]`, whose logits count."""

    @abstractmethod
    def dense_hidden(self, ids: Tensor) -> Tensor:
        """What the dense model's last block gives for the same tokens; no gradients."""

    def pieces(self, tokens: int) -> list[slice]:
        """Parts of so many tokens whose logits may exist at a time."""
        rows = max(1, _LOGITS_AT_ONCE // self.runner.model.lm_head.out_features)
        return [slice(start, start + rows) for start in range(0, tokens, rows)]

    def kl(self, hidden: Tensor, dense_hidden: Tensor) -> Tensor:
        """KL divergence of a stage's next-token distribution from the dense model's, float32 `[tokens]`, in nats.

        Both are last hidden states, `[tokens, hidden]`.
        """
        with torch.no_grad():
            dense = self.dense.logits(dense_hidden).float().log_softmax(-1)
        ours = self.runner.logits(hidden).float().log_softmax(-1)
        return (dense.exp() * (dense - ours)).sum(-1)

    @torch.no_grad()
    def divergences(self, ids: Tensor, batch: int) -> Tensor:
        """float64 `[S]` on the host: each sequence's mean KL divergence from the dense model, in nats a token."""
        means = []
        for part in ids.split(batch):
            hidden, dense = self.hidden(part).flatten(0, 1), self.dense_hidden(part).flatten(0, 1)
            kl = torch.cat([self.kl(hidden[piece], dense[piece]).cpu() for piece in self.pieces(len(hidden))])
            means.append(kl.double().view(len(part), -1).mean(1))
        return torch.cat(means)
