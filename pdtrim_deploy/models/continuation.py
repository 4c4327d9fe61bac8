"""What a model says behind prompts, token by token and many prompts at a time."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from pdtrim_deploy.models.blockwise import Blockwise, CausalLM
from pdtrim_deploy.models.layer_kv import LayerKV


@torch.no_grad()
def continued(
    model: CausalLM, prompts: Tensor, tokens: int, never: Collection[int] = (), draws: Tensor | None = None
) -> Tensor:
    """int64 `[S, tokens]`: the continuation of each of `prompts`, int64 `[S, P]`.

    Args:
        never: ids that are not chosen, such as those that end a text: continuations all have `tokens` tokens.
        draws: float64 `[S, tokens]` in [0, 1), by which tokens are sampled at temperature 1; None: the likeliest one.

    """
    runner, kv = Blockwise(model), [LayerKV() for _ in model.model.layers]
    barred, at, step, tokens_out = sorted(never), 0, prompts, list[Tensor]()
    for number in range(tokens):
        hidden, span = runner.embed(step, at)
        for layer, held in enumerate(kv):
            hidden = runner.block(layer, hidden, span, held)
            held.ranges = ((0, span.stop),)  # as one range: a mask for each step's many would grow with them
        logits = runner.logits(hidden[:, -1:])[:, 0].float()
        logits[:, barred] = -torch.inf
        at, step = span.stop, _chosen(logits, None if draws is None else draws[:, number])[:, None]
        tokens_out.append(step)
    return torch.cat(tokens_out, 1)


def _chosen(logits: Tensor, draw: Tensor | None) -> Tensor:
    """int64 `[S]`: the likeliest, or the first at which the summed probabilities pass the draw."""
    if draw is None:
        return logits.argmax(-1)
    sums = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(sums, draw.to(sums)[:, None] * sums[:, -1:], right=True)[:, 0]
