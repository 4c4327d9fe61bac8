"""Several continuations of each prompt, judged behind one plan: log-probabilities and the likeliest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_deploy.models.blockwise import pick
from pdtrim_deploy.models.oracle import PDOracle, PrefillState


@dataclass(frozen=True)
class Judgement:
    """`logprobs` float32, 0 beyond a continuation's length; `top` int64, the likeliest token, -1 beyond; `[B, C, T]`.

    Both are on the host.
    The first place is judged by prefill's logits, as in PD serving; the others by decode.
    """

    logprobs: Tensor
    top: Tensor


def judge(
    oracle: PDOracle, state: PrefillState, continuations: Tensor, lengths: Tensor, pass_tokens: int | None = None
) -> Judgement:
    """Judge `continuations`, int64 `[B, C, T >= 2]` padded on the right, of which `lengths` `[B, C]` tokens count.

    The prompt's KV is handed over and held once, whatever C is: continuations are branches of one sequence.
    Attention is causal: padding changes nothing before it.

    Args:
        pass_tokens: of a continuation that is alone, decode reads so many at a time; None: all. What each token sees
            takes memory by their number times the number before them.

    """
    if pass_tokens is None or continuations.shape[1] > 1:
        return judge_parts(oracle, [state], [continuations], [lengths])[0]
    held, parts = oracle.hand_over(state), continuations[:, 0, :-1].split(pass_tokens, dim=1)
    starts = range(state.tokens, state.tokens + continuations.shape[2], pass_tokens)
    hidden = torch.cat([oracle.extend(ids, start, held) for ids, start in zip(parts, starts, strict=False)], dim=1)
    return _judged(oracle, state, continuations, lengths, hidden)


@torch.no_grad()
def judge_parts(
    oracle: PDOracle, states: Sequence[PrefillState], continuations: Sequence[Tensor], lengths: Sequence[Tensor]
) -> list[Judgement]:
    """`judge` of each batch of prompts of one length; all go through a block before any goes through the next."""
    branches = [ids[..., :-1].flatten(1) for ids in continuations]
    hidden = oracle.extend_parts(branches, states, continuations[0].shape[1])
    batches = zip(states, continuations, lengths, hidden, strict=True)
    return [_judged(oracle, *batch) for batch in batches]


@torch.no_grad()
def _judged(oracle: PDOracle, state: PrefillState, continuations: Tensor, lengths: Tensor, hidden: Tensor) -> Judgement:
    batch, choices, tokens = continuations.shape
    counts = torch.arange(tokens) < lengths[..., None]
    logprobs, top = torch.zeros(continuations.shape), torch.full_like(continuations, -1)
    logprobs[..., 0] = pick(state.logits[:, None].expand(-1, choices, -1), continuations[..., 0]).cpu()
    top[..., 0] = state.logits.argmax(-1)[:, None].cpu()
    later = counts[..., 1:]
    later_hidden = hidden.view(batch, choices, tokens - 1, -1)[later.to(hidden.device)]
    picked = continuations[..., 1:][later]
    step = oracle.decode.logits_step
    scored = [
        (pick(logits := oracle.decode.logits(part), ids).cpu(), logits.argmax(-1).cpu())
        for part, ids in zip(later_hidden.split(step), picked.split(step), strict=True)
    ]
    logprobs[..., 1:][later] = torch.cat([lp for lp, _ in scored])
    top[..., 1:][later] = torch.cat([best for _, best in scored])
    return Judgement(logprobs, top)


@torch.no_grad()
def greedy(oracle: PDOracle, prompts: Tensor, tokens: int) -> Tensor:
    """int64 `[B, tokens]` on the host: each prompt's likeliest continuation, all side by side (no stop token)."""
    state = oracle.prefill(prompts)
    held, logits, chosen = oracle.hand_over(state), state.logits, [state.logits.argmax(-1)]
    for position in range(state.tokens, state.tokens + tokens - 1):
        logits = oracle.decode.logits(oracle.extend(chosen[-1][:, None], position, held)[:, -1])
        chosen.append(logits.argmax(-1))
    return torch.stack(chosen, dim=1).cpu()
