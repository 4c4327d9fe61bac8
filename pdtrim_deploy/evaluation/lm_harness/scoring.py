"""Log-likelihoods of continuations behind a plan, by token ids, for either hand-over.

`served`: prefill's logits judge a continuation's first token, as a pair serves it. `decode`: prefill reads the context
but for its last token, which decode reads: every token is judged by decode behind transferred KV, so an answer of one
token touches decode and the transfer too. A context of one token leaves nothing to hold back; there both are `served`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias

import torch

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.tasks.base import KV_TOKENS, Part
from pdtrim_deploy.evaluation.tasks.judge import judge
from pdtrim_deploy.models.oracle import PDOracle

HandOver: TypeAlias = Literal["served", "decode"]
Ids: TypeAlias = tuple[int, ...]
BRANCH_TOKENS = 2048  # continuation tokens of a prompt that decode reads in a pass; longer ones go by themselves


def split(context: Ids, hand_over: HandOver) -> tuple[Ids, Ids]:
    """What prefill reads of a context, and what decode reads of it."""
    held_back = 1 if hand_over == "decode" and len(context) > 1 else 0
    return context[: len(context) - held_back], context[len(context) - held_back :]


def loglikelihoods(
    oracle: PDOracle,
    pairs: Sequence[tuple[Ids, Ids]],
    hand_over: HandOver,
    note: Callable[[str], None] = lambda _: None,
) -> list[tuple[float, bool]]:
    """For each context and continuation (a token at least, each): the sum in nats, and whether it is the greedy text.

    Continuations of equal prompts are branches of one prefill; prompts of equal length share a batch. A pass of decode
    reads at most `KV_TOKENS` tokens, and of a prompt `BRANCH_TOKENS`: a long window takes no quadratic memory.

    Raises:
        UserError: a sum is not a number, or infinite.

    """
    results: dict[int, tuple[float, bool]] = {}
    for batch in _batches([(*split(context, hand_over), continuation) for context, continuation in pairs]):
        prompts = torch.tensor([prompt for prompt, _ in batch])
        part = Part.of(prompts, [[lead + text for _, lead, text in rows] for _, rows in batch], [""] * len(batch))
        judgement = judge(oracle, oracle.prefill(prompts), part.continuations, part.lengths, BRANCH_TOKENS)
        for item, (_, rows) in enumerate(batch):
            for branch, (number, lead, text) in enumerate(rows):
                judged = slice(len(lead), len(lead) + len(text))
                total = float(judgement.logprobs[item, branch, judged].double().sum())
                likeliest = judgement.top[item, branch, judged].tolist()
                results[number] = total, likeliest == list(text)
        note(f"{len(results)}/{len(pairs)} continuations")
    if broken := sum(not math.isfinite(total) for total, _ in results.values()):
        raise UserError(
            f"{broken} of {len(pairs)} likelihoods are not finite; load the model in float32 or check its weights"
        )
    return [results[number] for number in range(len(pairs))]


_Rows: TypeAlias = list[tuple[int, Ids, Ids]]


def _batches(pairs: list[tuple[Ids, Ids, Ids]]) -> Iterator[list[tuple[Ids, _Rows]]]:
    """Prompts of equal length with as many branches each: `(prompt, [(place, decode's context, continuation)])`."""
    by_prompt: dict[Ids, _Rows] = defaultdict(list)
    for number, (prompt, lead, text) in enumerate(pairs):
        by_prompt[prompt].append((number, lead, text))
    alike: dict[tuple[int, int], list[tuple[Ids, _Rows]]] = defaultdict(list)
    for prompt, rows in by_prompt.items():
        for branches in _passes(sorted(rows, key=_tokens)):
            alike[len(prompt), len(branches)].append((prompt, branches))
    for (length, count), items in alike.items():
        items.sort(key=lambda item: _tokens(item[1][-1]))  # of like length: less padding
        longest = _tokens(items[-1][1][-1])
        size = max(1, min(KV_TOKENS // length, KV_TOKENS // (count * longest)))
        for at in range(0, len(items), size):
            yield items[at : at + size]


def _passes(rows: _Rows) -> Iterator[_Rows]:
    """`rows`, ascending in tokens, in parts of at most BRANCH_TOKENS tokens once padded."""
    branches: _Rows = []
    for row in rows:
        if branches and (len(branches) + 1) * _tokens(row) > BRANCH_TOKENS:
            yield branches
            branches = []
        branches.append(row)
    yield branches


def _tokens(row: tuple[int, Ids, Ids]) -> int:
    return len(row[1]) + len(row[2])
