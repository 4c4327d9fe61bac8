"""sgl-eval itself against recorded answers: who gets which answer, which are right, and what is made of pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from answering import answering

from pdtrim_deploy.errors import ServingError
from pdtrim_deploy.evaluation.generated import TASKS, sgl_eval
from pdtrim_deploy.evaluation.generated.base import Question, QuestionSet
from pdtrim_deploy.evaluation.generated.pairing import mcnemar
from pdtrim_deploy.evaluation.generated.served import Pair
from pdtrim_deploy.local.own_environment import REPO

INSTALLED = (REPO / ".venv" / "evals" / "pdtrim-stamp.json").is_file()
needs_evals = pytest.mark.skipif(not INSTALLED, reason="needs .venv/evals: make setup-evals")
SUMS = tuple(Question(f"s-{n}", f"What is {n} plus {n}?", str(2 * n)) for n in range(1, 6))
DATA = QuestionSet("sums", "none", "0" * 64, SUMS)


def solved(problem: str) -> str:
    number = int(problem.split(" plus ", maxsplit=1)[0].rsplit(maxsplit=1)[-1])
    return f"{number} + {number} is \\boxed{{{2 * number}}}." + " Indeed" * number


def careless(problem: str) -> str:
    """Right for 1 and 2; then a wrong number, no box, and a text that was cut."""
    text = solved(problem)
    for number, other in ((3, "so \\boxed{7}"), (4, "It is eight, I think"), (5, "5 plus 5 is the sum of...")):
        text = other if f"{number} plus" in problem else text
    return text


@needs_evals
def test_answers_are_graded_and_paired_question_by_question(tmp_path: Path) -> None:
    bodies: list[dict] = []
    with answering(careless, bodies) as url, answering(solved) as dense:
        task = Pair(url, dense, 4, 64).judge(TASKS["gsm8k"], DATA, {"gsm8k": 0.95}, tmp_path / "answers.jsonl")
    assert (task.questions, task.score, task.dense, task.truncated) == (5, 0.4, 1.0, 1)
    assert task.difference == pytest.approx(-0.6)
    assert task.difference_stderr == pytest.approx((0.3 / 5) ** 0.5)
    assert task.p == 0.25
    assert (task.recovery.recovery, task.recovery.passed) == (0.4, False)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [question.id for question in SUMS]
    assert [row["pair"]["text"] for row in rows] == [careless(question.problem) for question in SUMS]
    assert [row["pair"]["right"] for row in rows] == [True, True, False, False, False]
    assert [row["dense"]["text"] for row in rows] == [solved(question.problem) for question in SUMS]
    assert all(body["temperature"] == 0 and body["max_tokens"] == 64 for body in bodies)
    assert all("boxed" in body["messages"][-1]["content"] for body in bodies)


@needs_evals
def test_humaneval_asks_for_a_function_and_runs_it() -> None:
    problems = tuple(
        Question(
            f"h/{name}", f"def {name}(x):\n    '''The same.'''\n", "", (f"def check(f):\n    assert f(3) == {n}", name)
        )
        for n, name in ((3, "keep"), (4, "lose"))
    )
    with answering(lambda text: f"```python\ndef {'keep' if 'keep' in text else 'lose'}(x):\n    return x\n```") as url:
        task = Pair(url, None, 2, None, 2).judge(TASKS["humaneval"], QuestionSet("h", "none", "", problems), {})
    assert (task.questions, task.score, task.dense, task.recovery) == (2, 0.5, None, None)


@needs_evals
def test_a_question_without_an_answer_is_no_wrong_answer() -> None:
    with (
        answering(lambda text: None if "3 plus" in text else solved(text)) as url,
        pytest.raises(ServingError, match=r"1 of 5 questions of gsm8k got no answer, s-3 the first"),
    ):
        Pair(url, None, 4).judge(TASKS["gsm8k"], DATA, {})


def test_a_text_may_hold_any_line_separator(tmp_path: Path) -> None:
    file = tmp_path / "out" / "run" / "output-rs0.jsonl"
    file.parent.mkdir(parents=True)
    row = {"id": "a", "generation": "x\u2028y\u2029z\u0085"}
    file.write_bytes((json.dumps(row, ensure_ascii=False) + "\n{").encode() + "é".encode()[:1])  # cut while written
    lines = sgl_eval._lines(tmp_path)
    assert (json.loads(lines[0]), len(lines)) == (row, 2)


def test_mcnemar_is_exact() -> None:
    assert mcnemar([True] * 6, [False] * 6) == 2 / 2**6
    assert mcnemar([True, False], [False, True]) == 1.0
    assert mcnemar([True] * 5, [True] * 5) == 1.0
    assert mcnemar([True] * 5 + [False], [False] * 5 + [True]) == pytest.approx(2 * 7 / 2**6)
    assert mcnemar([2, 1, 2, 0], [0, 0, 2, 1]) == 1.0, "of texts: two for the first, one for the second"
