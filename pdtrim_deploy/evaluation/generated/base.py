"""What a generated task is: questions, what the model is told of each, and whether an answer is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pdtrim_deploy.evaluation.corpora.base import Log
from pdtrim_deploy.local.cache import Cache


@dataclass(frozen=True)
class Question:
    """`problem` is shown to the model; `expected` is what a grader compares; `check` is a task's own."""

    id: str
    problem: str
    expected: str
    check: Any = None


@dataclass(frozen=True)
class QuestionSet:
    """Questions in their order, each id once, and where they are from."""

    source: str
    licence: str
    sha256: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Answer:
    """`right` is the grader's word; `reason` says why the text ended: `stop` or `length`."""

    text: str
    reason: str
    tokens: int
    right: bool


@dataclass(frozen=True)
class GeneratedTask:
    """A task by name.

    Attributes:
        load: its questions, from the cache or fetched into it.
        prompt: what the model is told, with `{problem}` in it; None: sgl-eval's own for GSM8K.
        right: whether an answer's text is right; None: sgl-eval's grader says so.
        max_tokens: of an answer, where nothing else is given.

    """

    name: str
    load: Callable[[Cache, Log], QuestionSet]
    prompt: str | None = None
    right: Callable[[Question, str], bool] | None = None
    max_tokens: int = 512
