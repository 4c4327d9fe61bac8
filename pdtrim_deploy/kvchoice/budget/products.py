"""What both searches compute of effects: inner products over all text, kept from build to build, and the exact KL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pdtrim_deploy.kvchoice.base import Problem
from pdtrim_deploy.models.blockwise import Blockwise


def effect_products(problem: Problem, key: list[Any], parts: Sequence[tuple[Callable[[], Tensor], int]]) -> Tensor:
    """Float64 `[effects, effects]` on the host, nats a token; from the problem's `memo`, if it has one, by `key`.

    Of each part of a text: what measures effects `[effects, coordinates]`, and its number of tokens. A part's products
    are kept too, so that a measurement that was stopped goes on behind the last whole part, to the same bits.
    """

    def of_part(number: int) -> Tensor:
        effects = parts[number][0]()
        return (effects @ effects.T).double().cpu()

    def of_all() -> Tensor:
        products = torch.zeros((), dtype=torch.float64)
        for number in range(len(parts) - 1):
            products = products + remembered(problem, [*key, "part", number], partial(of_part, number))
        return (products + of_part(len(parts) - 1)) / sum(tokens for _, tokens in parts)

    return remembered(problem, key, of_all)


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
