"""Redundancy of a block: cosine between its input and its output (PDTrim; 1 - Block Influence of ShortGPT)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pdtrim_deploy.blockwise import Blockwise, CausalLM


@torch.no_grad()
def redundancy(
    model: CausalLM, ids: Tensor, batch: int = 4, progress: Callable[[str], None] = lambda _: None
) -> Tensor:
    """float64 `[blocks]`: mean over tokens of cos(x_i, x_{i+1}), from one pass over `ids`, int64 `[S, T]`.

    Token 0 of each sequence is left out: it is the attention sink, whose state one block blows up a hundredfold
    and others then leave as it is, so it tells nothing of the rest. Two hidden states exist at a time.
    """
    runner, total, done = Blockwise(model), torch.zeros(len(model.model.layers), dtype=torch.float64), 0
    for part in ids.split(batch):
        hidden, span = runner.embed(part)
        for block in range(len(runner.layers)):
            before, hidden = hidden, runner.block(block, hidden, span)
            cosine = torch.cosine_similarity(before[:, 1:].float(), hidden[:, 1:].float(), dim=-1)
            total[block] += cosine.double().sum()
        done += len(part)
        progress(f"redundancy: {done}/{len(ids)} sequences")
    return total / (ids.shape[0] * (ids.shape[1] - 1))
