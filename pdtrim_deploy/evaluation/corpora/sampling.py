"""Token windows from documents."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.base import Document
from pdtrim_deploy.evaluation.corpora.rendering import beginning, opened, token_ids


def sequences(documents: Sequence[Document], tokenizer: Any, count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Deterministic windows of contiguous tokens, each inside one document, none overlapping: int64 [count, length].

    Every document gives one window before any gives a second. Where the tokenizer starts a text with its BOS token,
    so does every window (it counts in `length`). Where documents stand for requests (`served`), a window begins where
    one of them does, and the next ones fill it up. UserError when the documents cannot give so many.
    """
    if count < 1 or length < 2:
        raise UserError(f"{count} sequences of {length} tokens: at least 1 of at least 2 is needed")
    bos = beginning(tokenizer)
    rng = random.Random(seed)
    order = list(documents)
    rng.shuffle(order)
    rows: list[list[int]] = []
    if order and order[0].served:
        for ids in _packed(order, tokenizer, length - len(bos)):
            rows.append(bos + ids)
            if len(rows) == count:
                break
        order = []
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


def prompts(documents: Sequence[Document], tokenizer: Any, count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Prompts that wait for the model to go on: int64 `[count, length]`; `sequences` of documents that are prose.

    Of documents that stand for requests each prompt ends with one: a conversation without its last answer, its next
    turn opened. What comes before in other requests fills it up, and what is too long loses its beginning.
    """
    if not (documents and documents[0].served):
        return sequences(documents, tokenizer, count, length, seed)
    bos, end, order = beginning(tokenizer), _end(tokenizer), list(documents)
    random.Random(seed).shuffle(order)
    rows, before, size = list[list[int]](), list[int](), length - len(bos)
    for document in order:
        ids = before + token_ids(opened(document), tokenizer)
        if len(ids) < size:
            before += token_ids(document, tokenizer) + ([] if document.messages else end)
            continue
        rows.append(bos + ids[len(ids) - size :])
        before = []
        if len(rows) == count:
            return torch.tensor(rows, dtype=torch.int64)
    raise UserError(
        f"{len(documents)} documents give {len(rows)} prompts of {length} tokens, not {count}; ask for fewer or "
        "shorter ones or give more text"
    )


def _end(tokenizer: Any) -> list[int]:
    """What stands between two texts of one window."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _windows(document: Document, tokenizer: Any, length: int, shift: float) -> Iterator[list[int]]:
    """The document's windows end to end, from a start that spends the remainder before and behind them."""
    ids = token_ids(document, tokenizer)
    offset = int(shift * (len(ids) % length + 1))
    for start in range(offset, len(ids) - length + 1, length):
        yield ids[start : start + length]


def _packed(documents: Sequence[Document], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Windows filled with documents one behind the other; the last one's rest is left out, but for long documents.

    What long documents have left makes windows of its own once all have had a first one: one of each in turn.
    """
    end, window, rests = _end(tokenizer), list[int](), list[list[int]]()
    for document in documents:
        ids = token_ids(document, tokenizer) + ([] if document.messages else end)
        taken = length - len(window)
        window += ids[:taken]
        if len(window) == length:
            yield window
            window = []
            rests.append(ids[taken:])
    for start in range(0, max(map(len, rests), default=0), length):
        for rest in rests:
            if start + length <= len(rest):
                yield rest[start : start + length]
