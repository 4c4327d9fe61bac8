"""Token windows from documents."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.base import Document
from pdtrim_deploy.evaluation.corpora.rendering import beginning, opened, token_ids


@dataclass(frozen=True)
class Windows:
    """Token windows, int64 `[count, length]`; those of equal `documents`, numbers from 0, are of one document.

    They are not independent of each other. A window of several documents counts to its last, which alone may go on in
    others; documents of one group are one.
    """

    ids: torch.Tensor
    documents: tuple[int, ...]


def sequences(documents: Sequence[Document], tokenizer: Any, count: int, length: int, seed: int = 0) -> torch.Tensor:
    """The ids of `windows`: int64 `[count, length]`."""
    return windows(documents, tokenizer, count, length, seed).ids


def windows(documents: Sequence[Document], tokenizer: Any, count: int, length: int, seed: int = 0) -> Windows:
    """Deterministic windows of contiguous tokens, each inside one document, none overlapping.

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
    packed = bool(order) and order[0].served
    drawn = _packed(order, tokenizer, length - len(bos)) if packed else _taken(order, tokenizer, length - len(bos), rng)
    rows, numbers, texts = list[list[int]](), list[int](), dict[str, int]()
    for document, ids in islice(drawn, count):
        rows.append(bos + ids)
        numbers.append(texts.setdefault(document.group or document.id, len(texts)))
    if len(rows) < count:
        raise UserError(
            f"{len(documents)} documents give {len(rows)} sequences of {length} tokens, not {count}; "
            "ask for fewer or shorter ones or give more text"
        )
    return Windows(torch.tensor(rows, dtype=torch.int64), tuple(numbers))


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


def _taken(
    documents: Sequence[Document], tokenizer: Any, length: int, draw: random.Random
) -> Iterator[tuple[Document, list[int]]]:
    """One window of each document in turn."""
    waiting = [(d, _windows(d, tokenizer, length, draw.random())) for d in documents]
    while waiting:
        still = []
        for document, rest in waiting:
            window = next(rest, None)
            if window is not None:
                still.append((document, rest))
                yield document, window
        waiting = still


def _windows(document: Document, tokenizer: Any, length: int, shift: float) -> Iterator[list[int]]:
    """The document's windows end to end, from a start that spends the remainder before and behind them."""
    ids = token_ids(document, tokenizer)
    offset = int(shift * (len(ids) % length + 1))
    for start in range(offset, len(ids) - length + 1, length):
        yield ids[start : start + length]


def _packed(documents: Sequence[Document], tokenizer: Any, length: int) -> Iterator[tuple[Document, list[int]]]:
    """Windows filled with documents one behind the other, and the last of each.

    That one's rest is left out, but for long documents.

    What long documents have left makes windows of its own once all have had a first one: one of each in turn.
    """
    end, window, rests = _end(tokenizer), list[int](), list[tuple[Document, list[int]]]()
    for document in documents:
        ids = token_ids(document, tokenizer) + ([] if document.messages else end)
        taken = length - len(window)
        window += ids[:taken]
        if len(window) == length:
            yield document, window
            window = []
            rests.append((document, ids[taken:]))
    for start in range(0, max((len(rest) for _, rest in rests), default=0), length):
        for document, rest in rests:
            if start + length <= len(rest):
                yield document, rest[start : start + length]
