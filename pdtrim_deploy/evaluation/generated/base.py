"""What a generated task is: questions, what the model is told of each, and whether an answer is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pdtrim_deploy.evaluation.corpora.base import Log
from pdtrim_deploy.local.cache import Cache


@dataclass(frozen=True)
class Question:
    """`problem` is shown to the model; `expected` is what a grader compares; `check` is a task's own.

    `group` is what the question counts under beside the whole; `again` is the second turn of a conversation, whose
    reply is graded. Questions with the same `subject` are about one text: they are not independent.
    """

    id: str
    problem: str
    expected: str
    check: Any = None
    group: str = ""
    again: str | None = None
    subject: str | None = None


@dataclass(frozen=True)
class QuestionSet:
    """Questions in their order, each id once, and where they are from."""

    source: str
    licence: str
    sha256: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Answer:
    """`right` is the grader's word; `reason` says why the text ended: `stop` or `length`.

    `first` is the reply of a conversation's first turn.
    """

    text: str
    reason: str
    tokens: int
    right: bool
    first: str | None = None


@dataclass(frozen=True)
class Setting:
    """What questions are loaded or generated from.

    Attributes:
        lengths: tokens of prompt and answers together, ascending, of tasks with long prompts.
        answer: tokens of an answer at most.
        count: tokens that the served model's prompt has for a user's message.

    """

    cache: Cache
    note: Log = lambda _: None
    lengths: tuple[int, ...] = ()
    answer: int = 128
    count: Callable[[str], int] = len


@dataclass(frozen=True)
class GeneratedTask:
    """A task by name.

    Attributes:
        load: its questions: from the cache, fetched into it, or generated.
        prompt: what the model is told, with `{problem}` in it; None: sgl-eval's own for GSM8K.
        right: whether an answer's text is right; None: sgl-eval's grader says so.
        max_tokens: of an answer, where nothing else is given.
        items: of the first questions, where nothing else is given; None: all.
        long: whether its questions have `Setting.lengths`.

    """

    name: str
    load: Callable[[Setting], QuestionSet]
    prompt: str | None = None
    right: Callable[[Question, str], bool] | None = None
    max_tokens: int = 512
    items: int | None = None
    long: bool = False
