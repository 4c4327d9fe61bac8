"""Random tokens of the tiny families, and what plain transformers predict for them."""

import torch
from torch import Tensor

from pdtrim_deploy.models.oracle import PDOracle


def text(batch: int, tokens: int, seed: int = 0) -> Tensor:
    """Ids `[batch, tokens]` that every tiny vocabulary has."""
    return torch.randint(3, 259, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def plain(oracle: PDOracle, ids: Tensor) -> Tensor:
    """`[batch, tokens - 1]`: log-probability of each token but the first, by transformers' own forward pass."""
    logits = oracle.prefill_model(ids, use_cache=False).logits.log_softmax(-1)
    return logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
