"""Log-probabilities of tokens on a CPU, a few columns of the logits at a time: no matrix of all logits exists.

A matrix of all logits of 255 positions is 50 MB for SmolLM2. Writing it, and what log-softmax makes of it, to fresh
memory takes as long as a third of the product itself. A piece of 512 tokens stays in the processor's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PIECE = 512  # tokens of the vocabulary
ROWS = 1024  # positions


def in_pieces(head: nn.Module) -> bool:
    """Whether the logits of `head` are its weight's products alone, in float32 on the host."""
    weight = getattr(head, "weight", None)
    plain = type(head) is nn.Linear and head.bias is None and not (head._forward_pre_hooks or head._forward_hooks)
    return plain and isinstance(weight, Tensor) and weight.is_cpu and weight.dtype == torch.float32


def token_logprobs(weight: Tensor, normed: Tensor, targets: Tensor, scaling: float | None = None) -> Tensor:
    """float32 `[positions]`: log-softmax of `normed @ weight.T / scaling` at `targets`.

    Args:
        weight: of the LM head, float32 `[vocabulary, hidden]`.
        normed: what the LM head reads, float32 `[positions, hidden]`.
        targets: int64 `[positions]`.
        scaling: what logits are divided by, if anything.

    """
    parts = zip(normed.split(ROWS), targets.split(ROWS), strict=True)
    return torch.cat([_of_rows(weight, *part, scaling) for part in parts])


def _of_rows(weight: Tensor, normed: Tensor, targets: Tensor, scaling: float | None) -> Tensor:
    sums, chosen = list[Tensor](), list[Tensor]()
    for start in range(0, len(weight), PIECE):
        logits = nn.functional.linear(normed, weight[start : start + PIECE])
        if scaling is not None:
            logits = logits / scaling
        sums.append(logits.logsumexp(-1))
        inside = (targets - start).clamp(0, logits.shape[1] - 1)  # of other pieces' tokens any column: not read
        chosen.append(logits.gather(-1, inside[:, None])[:, 0])
    at = torch.stack(chosen, -1).gather(-1, (targets // PIECE)[:, None])[:, 0]
    return at - torch.stack(sums, -1).logsumexp(-1)
