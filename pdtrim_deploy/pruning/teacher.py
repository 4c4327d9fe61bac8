"""What the dense model predicts behind each token of a text: its likeliest next tokens, and the mass of all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_deploy.models.blockwise import Blockwise, CausalLM
from pdtrim_deploy.models.layer_run import LayerRun

TOP = 64  # tokens whose probabilities are kept: 0.5 kB a position
_BATCH = 4  # sequences


@dataclass(frozen=True)
class Teacher:
    """Next-token distributions of the dense model at `[..., P]` positions; the last axis of each tensor is its own.

    On the host, wherever the models are.

    Attributes:
        tokens: int32 `[..., P, k]`, the likeliest ones.
        logprobs: float32 `[..., P, k + 1]`: theirs, and last the logarithm of what all other tokens have together.
        block_forwards: what computing them cost.

    """

    tokens: Tensor
    logprobs: Tensor
    block_forwards: int = 0

    @classmethod
    @torch.no_grad()
    def of(cls, model: CausalLM, ids: Tensor, top: int = TOP, note: Callable[[str], None] = lambda _: None) -> Teacher:
        """Of `ids`, int64 `[S, T]`: P is T - 1, and position t predicts token t + 1. The model runs once."""
        runner, parts = Blockwise(model), ids[:, :-1].split(_BATCH)
        run = LayerRun(runner, parts)
        while run.running:
            run.advance()
            note(f"predictions of the dense model: {run.layer}/{len(runner.layers)} blocks")
        states = run.states
        most = model.lm_head.out_features - 1
        kept = [_likeliest(logits, min(top, most)) for hidden in states for logits in _logits(runner, hidden)]
        tokens, logprobs = (torch.cat(side).unflatten(0, (len(ids), -1)) for side in zip(*kept, strict=True))
        return cls(tokens.int(), logprobs, len(runner.layers) * len(ids))

    def __getitem__(self, at: slice | tuple[slice, ...]) -> Teacher:
        """Of some sequences and positions, as of a tensor `[S, P]`."""
        return Teacher(self.tokens[at], self.logprobs[at])

    @torch.no_grad()
    def divergence(self, runner: Blockwise, hidden: Tensor) -> Tensor:
        """float32 `[S, P]`: KL(dense || student) in nats behind each of the student's last states `[S, P, hidden]`.

        All but the kept tokens count as one, so it is a lower bound of the KL over the vocabulary.
        """
        tokens, logprobs = self.tokens.flatten(0, 1), self.logprobs.flatten(0, 1)
        parts, at = list[Tensor](), 0
        for logits in _logits(runner, hidden):
            rows = slice(at, at + len(logits))
            ours, at = _grouped(logits, tokens[rows].long().to(logits.device)).cpu(), rows.stop
            parts.append((logprobs[rows].exp() * (logprobs[rows] - ours)).sum(-1))
        return torch.cat(parts).view(hidden.shape[:2])


def _logits(runner: Blockwise, hidden: Tensor) -> Iterator[Tensor]:
    """float32 `[positions, vocabulary]` of all positions of `hidden` in order, at most 64 MiB (or a position) each."""
    for part in hidden.flatten(0, 1).split(runner.logits_step):
        yield runner.logits(part).float()


def _likeliest(logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    tokens = logits.topk(top).indices
    return tokens.cpu(), _grouped(logits, tokens).cpu()


def _grouped(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities `[positions, k + 1]` of `tokens` `[positions, k]`, and of all others together."""
    others = logits.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    kept = logits.gather(-1, tokens)
    both = torch.cat((kept, others), -1)
    return both - both.logsumexp(-1, keepdim=True)
