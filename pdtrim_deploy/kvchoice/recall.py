"""Calibration text that needs the middle of a prompt. Pure: no torch.

Plain text seldom does, so losses measured on it do not hold for prompts that are searched for a fact. Here some
sequences repeat a passage of their middle: its first tokens end the prompt, and the rest is the continuation, which a
language model copies if it can still read the passage (induction heads).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pdtrim_deploy.recipe.recall_bounds import CUE, last_start

if TYPE_CHECKING:
    from torch import Tensor


def with_recall(ids: Tensor, prompt_tokens: int, share: float, seed: int, parts: Sequence[int] = ()) -> Tensor:
    """A copy of `ids`, int64 `[S, T]`, in which a `share` of the sequences, evenly spread, repeat a passage.

    Passages begin after the first eighth of the prompt and end before its last quarter. `parts` says which corpus of a
    mixture each sequence is of: the share is spread over the sequences of each corpus. Corpora take turns, so that
    every fourth sequence may be of one corpus.
    """
    ids, draw, length = ids.clone(), random.Random(seed), ids.shape[1] - prompt_tokens + CUE
    latest = last_start(prompt_tokens, ids.shape[1] - prompt_tokens)
    order = sorted(range(len(ids)), key=lambda row: parts[row]) if parts else range(len(ids))
    for at in range(round(share * len(ids))):
        row = ids[order[int(at / share)]]
        start = draw.randrange(prompt_tokens // 8, latest)
        row[prompt_tokens - CUE :] = row[start : start + length].clone()
    return ids
