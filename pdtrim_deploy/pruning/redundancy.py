"""Redundancy: cosine between the hidden states in front of one block and behind another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.blockwise import Blockwise, CausalLM
from pdtrim_deploy.models.layer_run import LayerRun


def redundancy(
    model: CausalLM, ids: Tensor, batch: int = 4, progress: Callable[[str], None] = lambda _: None
) -> Tensor:
    """float64 `[blocks]`: cos(x_i, x_{i+1}) of each block (PDTrim; 1 - Block Influence of ShortGPT)."""
    return similarity(model, ids, (1,), batch, progress)[1]


@torch.no_grad()
def similarity(
    model: CausalLM,
    ids: Tensor,
    spans: Sequence[int],
    batch: int = 4,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[int, Tensor]:
    """For each span n float64 `[blocks + 1 - n]`: mean over tokens of cos(x_i, x_{i+n}), from one pass over `ids`.

    Token 0 of each sequence, int64 `[S, T]`, is left out: it is the attention sink, whose state one block blows up a
    hundredfold and others then leave as it is, so it tells nothing of the rest. Each block runs on all of the text, for
    it may come from disk; max(spans) + 1 hidden states of the text exist at a time.

    Raises:
        UserError: a hidden state is not a number.

    """
    blocks = len(model.model.layers)
    total = {span: torch.zeros(blocks + 1 - span, dtype=torch.float64) for span in spans}
    run = LayerRun(Blockwise(model), ids.split(batch))
    states = [deque([hidden], max(spans) + 1) for hidden in run.states]
    for block in range(blocks):
        run.advance()
        for last, hidden in zip(states, run.states, strict=True):
            last.append(hidden)
            for span in (span for span in spans if span <= block + 1):
                before, after = last[-1 - span][:, 1:], last[-1][:, 1:]
                cosine = torch.cosine_similarity(before.to(after.device).float(), after.float(), dim=-1)
                total[span][block + 1 - span] += float(cosine.double().sum())
        progress(f"redundancy: {block + 1}/{blocks} blocks")
    if not all(bool(torch.isfinite(sums).all()) for sums in total.values()):
        raise UserError("hidden states are not numbers; load the model in float32, check its weights")
    return {span: sums / (ids.shape[0] * (ids.shape[1] - 1)) for span, sums in total.items()}
