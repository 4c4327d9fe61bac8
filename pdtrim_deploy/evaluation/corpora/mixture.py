"""Sequences of several corpora in given shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pdtrim_deploy.evaluation.corpora.base import Document
from pdtrim_deploy.evaluation.corpora.sampling import sequences

Part = tuple[Sequence[Document], float]
Draw = Callable[[Sequence[Document], Any, int, int, int], Tensor]


def mixed(
    parts: Sequence[Part], tokenizer: Any, count: int, length: int, seed: int = 0, draw: Draw = sequences
) -> Tensor:
    """`count` rows of all parts, documents and their share, as `draw` makes them of each: int64 `[count, length]`.

    They take turns so that any first few hold the shares as nearly as whole numbers can.
    """
    turns = in_turn([share for _, share in parts], count)
    rows = [
        iter(draw(documents, tokenizer, turns.count(part), length, seed) if part in turns else ())
        for part, (documents, _) in enumerate(parts)
    ]
    return torch.stack([next(rows[part]) for part in turns])


def in_turn(shares: Sequence[float], count: int) -> list[int]:
    """Which part each of `count` turns is of: always the one that is furthest behind its share, the first of equals."""
    total, taken, turns = sum(shares), [0] * len(shares), list[int]()
    for turn in range(1, count + 1):
        part = max(range(len(shares)), key=lambda at: (turn * shares[at] / total - taken[at], -at))
        taken[part] += 1
        turns.append(part)
    return turns
