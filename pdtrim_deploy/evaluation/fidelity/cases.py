"""The prompts of the check: every situation in which sparse transfer could be right only by luck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.plan.kv import SHARE_UNIT

How = Literal["in turn", "at once", "one batch", "after aborts"]
LONG = 300


@dataclass(frozen=True)
class Group:
    """Prompts sent together in one way; `aborts` are prompts begun and dropped by the client just before."""

    name: str
    how: How
    prompts: tuple[tuple[int, ...], ...]
    aborts: tuple[tuple[int, ...], ...] = ()


def text_needed(plan: PDPlan) -> tuple[int, int]:
    """How many token sequences, and of what length, `groups` draws from."""
    return 32, max(LONG + 230, _window(plan) + LONG)


def groups(plan: PDPlan, texts: Sequence[Sequence[int]]) -> list[Group]:
    """All groups, at least 24 prompts; `texts` are disjoint real token sequences as `text_needed` says."""
    supply = iter(texts)

    def cut(length: int) -> tuple[int, ...]:
        return tuple(next(supply)[:length])

    window, switch = _window(plan), _switch(plan)
    edges = sorted({1, 2, max(1, window - 1), window, window + 1, *switch})
    seen = cut(LONG)
    return [
        Group("around first + last", "in turn", tuple(cut(n) for n in edges)),
        Group("longer than a chunk", "in turn", (seen, cut(LONG + 1), cut(LONG + 211), cut(window + 128))),
        Group("prefix-cache hits", "in turn", (seen, seen[:200] + cut(100), seen + cut(37), seen[:-1])),
        Group("concurrent, unlike lengths", "at once", tuple(cut(n) for n in (17, 64, 129, 200, 256, LONG, 90, 33))),
        Group("one batch, unlike lengths", "one batch", tuple(cut(n) for n in (5, 70, 150, LONG))),
        Group(
            "after client aborts", "after aborts", tuple(cut(n) for n in (180, 240, LONG)),
            aborts=tuple(cut(LONG) for _ in range(3)),
        ),
    ]  # fmt: skip


def _switch(plan: PDPlan) -> tuple[int, ...]:
    """The longest prompt of which a layer with a share keeps its least number of rows, and a token more."""
    longest = (((send.n_first + send.n_last) * SHARE_UNIT // send.share) for send in plan.kv if send.share)
    tokens = max((length for length in longest if length < LONG), default=0)
    return (tokens, tokens + 1) if tokens else ()


def _window(plan: PDPlan) -> int:
    """Longest first + last of any layer, or its window; a dense plan is probed as if it had one."""
    return max((send.n_first + send.n_last for send in plan.kv if send.mode != "full"), default=68)
