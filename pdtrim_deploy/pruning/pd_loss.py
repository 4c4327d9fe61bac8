"""What stages in memory lose on text, nats a token."""

from __future__ import annotations

import torch
from torch import Tensor

from pdtrim_deploy.blockwise import Blockwise, pick
from pdtrim_deploy.pruning.healing.readers import Behind, HandOver
from pdtrim_deploy.pruning.pair import StagePair

_BATCH = 4


@torch.no_grad()
def pd_loss(pair: StagePair, ids: Tensor) -> float:
    """Mean NLL of tokens T/2 .. T-1 of `ids`, int64 `[S, T]`, as a PD pair gives them behind whole KV.

    The first is from prefill's logits, the others decode's.
    """
    prompt, total = ids.shape[1] // 2, 0.0
    prefill, decode = pair.stage("prefill"), Behind(pair.stage("decode"))
    hand_over, runner = HandOver(prefill, pair.plan.layer_map), Blockwise(prefill)
    for part in ids.split(_BATCH):
        hidden, span = runner.embed(part[:, :prompt])
        for layer in range(len(runner.layers)):
            hidden = runner.block(layer, hidden, span)
        first = pick(runner.logits(hidden[:, -1]), part[:, prompt])
        logits = decode(part[:, :-1], prompt, hand_over(part[:, :prompt]))
        rest = pick(logits, part[:, prompt + 1 :].flatten())
        total -= float(first.double().sum() + rest.double().sum())
    return total / (len(ids) * (ids.shape[1] - prompt))


@torch.no_grad()
def prefill_loss(pair: StagePair, ids: Tensor) -> float:
    """Mean NLL of tokens 1 .. T-1 of `ids`, int64 `[S, T]`, by the prefill stage alone."""
    runner, total = Blockwise(pair.stage("prefill")), 0.0
    for part in ids.split(_BATCH):
        hidden, span = runner.embed(part[:, :-1])
        for layer in range(len(runner.layers)):
            hidden = runner.block(layer, hidden, span)
        total -= float(runner.logprobs(hidden, part[:, 1:]).double().sum())
    return total / ids[:, 1:].numel()
