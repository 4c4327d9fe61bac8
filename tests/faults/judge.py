"""Whether text is wrong: the oracle scores the tokens that were served, and says which it would have chosen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from client import Ended

    from pdtrim_deploy.models.oracle import PDOracle

# Nats, in float32. Beside the boundary of two codes of an fp8 pool the last bit of a sum decides: of 96 requests
# oracles in float32 and float64 differ by up to 0.01; where a page of 16 tokens is another's, by 0.14 and more.
TOLERANCE, FP8_TOLERANCE = 1e-3, 0.04


def off(oracle: PDOracle, outcome: Ended) -> float:
    """How far the served logprobs are from the oracle's, or the tokens from its likeliest ones, in nats."""
    if not outcome.tokens:
        return 0.0
    prompt, tokens = torch.tensor(outcome.request.prompt), torch.tensor(outcome.tokens)
    ids, values = oracle.top_logprobs(prompt, tokens, oracle.decode_model.config.vocab_size)  # all, the likeliest first
    right = values[ids == tokens[:, None]]
    return max((torch.tensor(outcome.logprobs) - right).abs().max().item(), (values[:, 0] - right).max().item())


def wrong(oracle: PDOracle, ended: Iterable[Ended]) -> list[Ended]:
    """Those with a token that is not the oracle's; what came before a failure or an abort counts too."""
    tolerance = TOLERANCE if oracle.plan.model.pool_dtype == "native" else FP8_TOLERANCE
    return [outcome for outcome in ended if not off(oracle, outcome) <= tolerance]
