"""What both searches compute of effects: inner products over all text, kept from build to build, and the exact KL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pdtrim_deploy.kvchoice.base import Problem
from pdtrim_deploy.models.blockwise import Blockwise


def effect_products(parts: Iterable[tuple[Tensor, int]]) -> Tensor:
    """Float64 `[effects, effects]` on the host, nats a token.

    Of effects `[effects, coordinates]` and the number of tokens of each part of a text.
    """
    products, tokens = torch.zeros((), dtype=torch.float64), 0
    for effects, count in parts:
        products = products + (effects @ effects.T).double().cpu()
        tokens += count
    return products / tokens


def remembered(problem: Problem, key: object, compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` gives; from the problem's `memo`, if it has one, under the digest of `key`."""
    if problem.memo is None:
        return compute()
    return problem.memo(hashlib.sha256(json.dumps(key).encode()).hexdigest(), compute)


def summed_kl(runner: Blockwise, reference: Tensor, hidden: Tensor) -> float:
    """KL in nats, summed over last states `[tokens, hidden]` of the reference predictions and of others."""
    total, step = 0.0, runner.logits_step
    for expected, other in zip(reference.split(step), hidden.split(step), strict=True):
        log_probs, dense = (runner.logits(states).float().log_softmax(-1) for states in (other, expected))
        total += float((dense.exp() * (dense - log_probs)).sum(dtype=torch.float64))
    return total
