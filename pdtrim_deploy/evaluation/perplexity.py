"""Perplexity of continuations as a PD pair serves them; the dense model's is that of its dense plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.pd_run import sequence_nll

BATCH = 4  # sequences


@dataclass(frozen=True)
class Perplexity:
    """Over `tokens` continuation tokens: mean NLL in nats, its exponential, each sequence's mean NLL."""

    nll_mean: float
    ppl: float
    tokens: int
    per_sequence: tuple[float, ...]


def pd_perplexity(
    oracle: PDOracle,
    sequences: Tensor,
    prompt_tokens: int,
    batch: int = BATCH,
    progress: Callable[[str], None] = lambda _: None,
    *,
    kv_bytes: int = 0,
) -> Perplexity:
    """Score all after the first `prompt_tokens` tokens of `sequences`, int64 `[S, N + T]`, teacher-forced.

    Memory is bounded by `batch` sequences' KV, or `kv_bytes` of several batches, which go side by side so that streamed
    blocks are read once for all; and a slice of logits (`Blockwise.logprobs`).

    Raises:
        UserError: no token is left to score, or the loss is not a number.

    """
    if not 1 <= prompt_tokens < sequences.shape[1]:
        raise UserError(
            f"prompt_tokens is {prompt_tokens} but sequences have {sequences.shape[1]} tokens; "
            f"choose from 1 to {sequences.shape[1] - 1}"
        )
    losses = list[Tensor]()
    progress(f"perplexity: 0/{len(sequences)} sequences")
    at_once = oracle.parts_at_once(batch, prompt_tokens, kv_bytes)
    for group in sequences.split(batch * at_once):
        parts = group.split(batch)
        states = oracle.prefill_parts([part[:, :prompt_tokens] for part in parts])
        losses += map(sequence_nll, oracle.score_parts(states, [part[:, prompt_tokens:] for part in parts]))
        progress(f"perplexity: {sum(len(part) for part in losses)}/{len(sequences)} sequences")
    per_sequence = torch.cat(losses)
    mean = float(per_sequence.mean())
    if not math.isfinite(mean):
        raise UserError(f"the loss is {mean}, not a number; load the model in float32 or check its weights")
    count = len(sequences) * (sequences.shape[1] - prompt_tokens)
    return Perplexity(mean, math.exp(mean), count, tuple(per_sequence.tolist()))
