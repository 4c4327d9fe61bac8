"""Token windows from documents."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.base import Document


def sequences(documents: Sequence[Document], tokenizer: Any, count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Deterministic windows of contiguous tokens, each inside one document, none overlapping: int64 [count, length].

    Every document gives one window before any gives a second. Where the tokenizer starts a text with its BOS token,
    so does every window (it counts in `length`). UserError when the documents cannot give so many.
    """
    if count < 1 or length < 2:
        raise UserError(f"{count} sequences of {length} tokens: at least 1 of at least 2 is needed")
    bos = beginning(tokenizer)
    rng = random.Random(seed)
    order = list(documents)
    rng.shuffle(order)
    rows: list[list[int]] = []
    waiting: list[Iterator[list[int]]] = [_windows(d, tokenizer, length - len(bos), rng.random()) for d in order]
    while waiting and len(rows) < count:
        still = []
        for windows in waiting:
            window = next(windows, None)
            if window is not None and len(rows) < count:
                rows.append(bos + window)
                still.append(windows)
        waiting = still
    if len(rows) < count:
        raise UserError(
            f"{len(documents)} documents give {len(rows)} sequences of {length} tokens, not {count}; "
            "ask for fewer or shorter ones or give more text"
        )
    return torch.tensor(rows, dtype=torch.int64)


def beginning(tokenizer: Any) -> list[int]:
    """The BOS token, where the tokenizer starts a text with it; else nothing."""
    start = tokenizer("")["input_ids"][:1]
    return start if start and start[0] == tokenizer.bos_token_id else []


def _windows(document: Document, tokenizer: Any, length: int, shift: float) -> Iterator[list[int]]:
    """The document's windows end to end, from a start that spends the remainder before and behind them."""
    ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    offset = int(shift * (len(ids) % length + 1))
    for start in range(offset, len(ids) - length + 1, length):
        yield ids[start : start + length]
