"""Generated tasks on a running pair, and on the dense model beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.evaluation.generated.base import Answer, GeneratedTask, Question, QuestionSet
from pdtrim_deploy.evaluation.generated.conversation import converse
from pdtrim_deploy.evaluation.generated.pairing import mcnemar
from pdtrim_deploy.evaluation.generated.sgl_eval import ask
from pdtrim_deploy.evaluation.measured import Measured
from pdtrim_deploy.evaluation.recovery import Recovery
from pdtrim_deploy.local.atomic import write_atomic


class GroupScore(BaseModel):
    """Shares of right answers among the questions of one group; the last three are None without a dense model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    group: str
    questions: int
    score: float
    dense: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None


class ServedTask(BaseModel):
    """Shares of right answers, 0 to 1, with standard errors; `truncated` are answers that ran into `max_tokens`.

    `dense`, `difference` and what follows are None where no dense model was asked. `p` is McNemar's, exact, where
    questions about one text count as one; `recovery` is the pair's share over the dense model's. `groups` are there
    where questions have several.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    source: str
    licence: str
    sha256: str
    questions: int
    max_tokens: int
    score: float
    stderr: float | None
    truncated: int
    dense: float | None = None
    dense_truncated: int | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    p: float | None = None
    recovery: Recovery | None = None
    groups: tuple[GroupScore, ...] = ()


class ServedReport(BaseModel):
    """Of one command; `plan_digest` is that of the bundle that the pair serves, where it was named.

    That bundle's calibration text has some questions of the tasks in `calibrated_on`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    against: str | None
    plan_digest: str | None
    concurrency: int
    tasks: tuple[ServedTask, ...]
    calibrated_on: tuple[str, ...] = ()
    environment: dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """Both URLs and how they are asked; `limit`: the first questions of each task, None: its own."""

    url: str
    against: str | None
    concurrency: int
    max_tokens: int | None = None
    limit: int | None = None

    def judge(
        self,
        task: GeneratedTask,
        data: QuestionSet,
        gates: Mapping[str, float],
        answers: Path | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> ServedTask:
        """Ask both, the pair first; a JSON line for each question goes to `answers`.

        Raises:
            ServingError: a question got no answer from either.

        """
        questions, longest = data.questions[: self.limit or task.items], self.max_tokens or task.max_tokens
        urls = [self.url] if self.against is None else [self.url, self.against]
        replies = [self._answers(target, task, questions, longest, note) for target in urls]
        if answers is not None:
            rows = zip(questions, *replies, strict=True)
            write_atomic(answers, "".join(json.dumps(_row(*row)) + "\n" for row in rows))
        return _judged(task, data, questions, replies, gates, longest)

    def _answers(
        self, url: str, task: GeneratedTask, questions: Sequence[Question], longest: int, note: Callable[[str], None]
    ) -> list[Answer]:
        driver = converse if any(question.again is not None for question in questions) else ask
        return driver(url, task, questions, longest, self.concurrency, lambda line: note(f"{task.name}, {url}: {line}"))


def _row(question: Question, *replies: Answer) -> dict[str, Any]:
    row: dict[str, Any] = {"id": question.id, "problem": question.problem, "expected": question.expected}
    if question.again is not None:
        row["again"] = question.again
    for who, reply in zip(("pair", "dense"), replies, strict=False):
        row[who] = {"right": reply.right, "reason": reply.reason, "tokens": reply.tokens, "text": reply.text}
        if reply.first is not None:
            row[who]["first"] = reply.first
    return row


def _judged(
    task: GeneratedTask,
    data: QuestionSet,
    questions: Sequence[Question],
    replies: Sequence[Sequence[Answer]],
    gates: Mapping[str, float],
    max_tokens: int,
) -> ServedTask:
    groups = tuple(question.group or "all" for question in questions)
    texts: dict[str, int] = {}
    subjects = tuple(texts.setdefault(question.subject or question.id, len(texts)) for question in questions)
    results = [_measured(task.name, groups, subjects, reply) for reply in replies]
    cut = [sum(answer.reason == "length" for answer in reply) for reply in replies]
    pair, count = results[0], len(replies[0])
    score = pair.mean("right")
    common: dict[str, Any] = {"task": task.name, "source": data.source, "licence": data.licence, "sha256": data.sha256}
    common |= {"questions": count, "max_tokens": max_tokens, "score": score, "truncated": cut[0]}
    none_right = Measured(task.name, groups, {"right": (0.0,) * count}, subjects)
    alone = pair.against(none_right, "right")
    common |= {"stderr": None if math.isnan(alone.stderr) else alone.stderr}
    common |= {"groups": _by_group(results)}
    if len(results) == 1:
        return ServedTask(**common)
    dense, paired = results[1], pair.against(results[1], "right")
    return ServedTask(
        **common,
        dense=dense.mean("right"),
        dense_truncated=cut[1],
        difference=paired.mean,
        difference_stderr=None if math.isnan(paired.stderr) else paired.stderr,
        p=mcnemar(*(_right_by_subject(subjects, reply) for reply in replies)),
        recovery=Recovery.of(dense, pair, gates),
    )


def _measured(name: str, groups: tuple[str, ...], subjects: tuple[int, ...], replies: Sequence[Answer]) -> Measured:
    return Measured(name, groups, {"right": tuple(float(answer.right) for answer in replies)}, subjects)


def _right_by_subject(subjects: Sequence[int], replies: Sequence[Answer]) -> list[int]:
    """Right answers of the questions about each text."""
    counts = [0] * (max(subjects) + 1)
    for subject, answer in zip(subjects, replies, strict=True):
        counts[subject] += answer.right
    return counts


def _by_group(results: Sequence[Measured]) -> tuple[GroupScore, ...]:
    """Of the pair, and beside the dense model where there is one; nothing of a single group."""
    pair, *others = results
    scores, names = [], dict.fromkeys(pair.groups)
    for group in names if len(names) > 1 else ():
        common = {"group": group, "questions": pair.groups.count(group), "score": pair.mean("right", group)}
        for dense in others:
            paired = pair.against(dense, "right", group)
            stderr = None if math.isnan(paired.stderr) else paired.stderr
            common |= {"dense": dense.mean("right", group), "difference": paired.mean, "difference_stderr": stderr}
        scores.append(GroupScore.model_validate(common))
    return tuple(scores)
