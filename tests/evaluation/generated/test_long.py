"""Long prompts: of the length that was asked for, with everything in them that the answer needs, and hard to guess."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from answering import answering

from pdtrim_deploy.errors import ServingError, UserError
from pdtrim_deploy.evaluation.generated import TASKS
from pdtrim_deploy.evaluation.generated.base import Answer, Question, QuestionSet, Setting
from pdtrim_deploy.evaluation.generated.conversation import converse
from pdtrim_deploy.evaluation.generated.endpoint import Endpoint
from pdtrim_deploy.evaluation.generated.lengths import check_contexts, choose
from pdtrim_deploy.evaluation.generated.served import Pair, _judged
from pdtrim_deploy.local.cache import Cache


def words(text: str) -> int:
    """Tokens of a tokenizer that splits long words."""
    return sum(1 + len(word) // 6 for word in text.split())


@pytest.fixture
def setting(cache: Cache) -> Setting:
    return Setting(cache, lengths=(1024, 4096), count=words)


def test_prompts_have_their_length(setting: Setting) -> None:
    for task, room in (("ruler", 128), ("turns", 2 * 128 + 64)):
        for question in TASKS[task].load(setting).questions:
            (length,) = (int(part) for part in question.group.split() if part.isdigit())
            assert 0.93 * (length - room) <= words(question.problem) <= length - room, question.id


def test_a_tokenizer_whose_tokens_grow_with_the_text_gets_no_longer_prompts(cache: Cache) -> None:
    def growing(text: str) -> int:
        return int(words(text) * (1 + len(text) / 20_000))

    for question in TASKS["ruler"].load(Setting(cache, lengths=(4096,), count=growing)).questions:
        assert growing(question.problem) <= 4096 - 128, question.id


def test_the_question_stands_last_and_first_over_the_same_text(setting: Setting) -> None:
    questions = TASKS["ruler"].load(setting).questions
    assert len({question.id for question in questions}) == len(questions) == 4 * 2 * 2 * 10
    assert len({question.group for question in questions[:16]}) == 16
    for last, first in zip(questions[::2], questions[1::2], strict=True):
        head, *context, tail = last.problem.split("\n\n")
        assert [head, tail, *context] == first.problem.split("\n\n")
        assert (last.expected, last.group.split()[-1], first.group.split()[-1]) == (first.expected, "last", "first")
        assert last.subject == first.subject
    assert len({question.subject for question in questions}) == len(questions) // 2


def test_questions_about_one_text_count_as_one_in_errors(setting: Setting) -> None:
    task, data = TASKS["ruler"], TASKS["ruler"].load(setting)
    right = [place // 2 % 4 != 0 for place in range(80)]  # both questions about a text have the same end
    replies = [[Answer("", "stop", 1, value) for value in side] for side in (right, [True] * 80)]
    judged = _judged(task, data, data.questions[:80], replies, {}, 128)
    by_text = judged.difference_stderr
    apart = replace(data, questions=tuple(replace(question, subject=None) for question in data.questions))
    judged_apart = _judged(task, apart, apart.questions[:80], replies, {}, 128)
    by_question = judged_apart.difference_stderr
    assert by_text is not None
    assert by_question is not None
    assert by_text / by_question == pytest.approx((79 / 39) ** 0.5)
    score = judged.score  # of the pair alone: the same, as all of the dense model's answers are right
    assert judged.stderr == pytest.approx((score * (1 - score) / 39) ** 0.5)
    assert judged_apart.stderr == pytest.approx((score * (1 - score) / 79) ** 0.5)
    assert judged.p == 2 / 2**10, "of 10 texts the dense model alone had answers right"
    assert judged_apart.p == 2 / 2**20


def test_answers_follow_from_the_texts(setting: Setting) -> None:
    for question in TASKS["ruler"].load(setting).questions[::2]:
        _, context, tail = question.problem.split("\n\n")
        kind, lines = question.group.split()[0], context.split("\n")
        if kind in ("single", "multi"):
            keys = tail.removeprefix("What are the special magic numbers for ").split(" mentioned")[0].split(" and ")
            values = dict(line.removesuffix(".").split("for ")[1].split(" is: ") for line in lines if "magic" in line)
            answer = [values[key] for key in keys]
        elif kind == "variables":
            (value,) = (word for word in tail.split() if word.rstrip(",").isdigit() and len(word.rstrip(",")) == 7)
            held, answer = {}, []
            for _, name, _, *source in (line.split() for line in lines if line.startswith("VAR ")):
                held[name] = held[source[1]] if source[0] == "VAR" else source[0]
                answer += [name] if held[name] == value.rstrip(",") else []
            assert len(held) == 10
        else:
            common = Counter(lines).most_common()
            assert common[2][1] > common[3][1]
            answer = [word for word, _ in common[:3]]
        assert sorted(answer) == sorted(question.check), question.id
        right = TASKS["ruler"].right
        assert right is not None
        assert right(question, f"They are: {' and '.join(answer)}.")
        assert not right(question, f"They are: {' and '.join(answer[1:])}.")


def test_the_second_turn_is_graded_behind_the_models_own_first_reply(setting: Setting, tmp_path: Path) -> None:
    data = TASKS["turns"].load(setting)
    by_question = {question.again: question.expected for question in data.questions}
    bodies: list[dict] = []

    def answer(text: str) -> str:
        return by_question.get(text, "I have read it")

    def forgetful(text: str) -> str:
        return answer(text) if text.startswith("Once more") else "I forgot"

    with answering(forgetful, bodies) as url, answering(answer) as dense:
        result = Pair(url, dense, 4, limit=8).judge(TASKS["turns"], data, {"turns": 0.9}, tmp_path / "turns.jsonl")
    assert (result.questions, result.score, result.dense, result.recovery.passed) == (8, 0.5, 1.0, False)
    groups = {group.group: (group.questions, group.score, group.dense) for group in result.groups}
    assert groups["same 1024"] == groups["same 4096"] == (2, 1.0, 1.0)
    assert groups["other 1024"] == groups["other 4096"] == (2, 0.0, 1.0)
    second = [body["messages"] for body in bodies if len(body["messages"]) > 1]
    assert len(second) == 8
    assert all([part["role"] for part in messages] == ["user", "assistant", "user"] for messages in second)
    assert all(messages[1]["content"] == "I forgot" for messages in second)
    assert all(body["model"] == "recorded" and body["temperature"] == 0 for body in bodies)
    rows = [json.loads(line) for line in (tmp_path / "turns.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [question.id for question in data.questions[:8]]
    assert [row["again"] for row in rows] == [question.again for question in data.questions[:8]]
    assert {row["dense"]["first"] for row in rows} == {"I have read it"}


def test_a_turn_without_a_reply_is_no_wrong_answer() -> None:
    question = Question("t-1", "Read.", "x", ("x",), again="Which?")
    with (
        answering(lambda text: None if text == "Which?" else "read") as url,
        pytest.raises(ServingError, match=r"turns, question t-1: .* refused a chat request \(HTTP 400: .*refused"),
    ):
        Pair(url, None, 1).judge(TASKS["turns"], QuestionSet("t", "none", "", (question,)), {})


def test_questions_of_one_name_are_each_answered() -> None:
    questions = [Question("t-1", f"Read {word}.", word, (word,), again=word) for word in ("one", "two")]
    with answering(lambda text: text) as url:
        replies = converse(url, TASKS["turns"], questions, 8, 2)
    assert [reply.text for reply in replies] == ["one", "two"]


_STOPPED = """
import os, signal, sys, threading
from pdtrim_deploy.evaluation.generated import TASKS
from pdtrim_deploy.evaluation.generated.base import Question
from pdtrim_deploy.evaluation.generated.conversation import converse
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    converse(sys.argv[1], TASKS["turns"], [Question("t-1", "Read.", "x", ("x",), again="Which?")], 8, 1)
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_waits_for_no_reply() -> None:
    ended = threading.Event()
    try:
        with answering(lambda _: None if ended.wait(60) else "late") as url:
            command = [sys.executable, "-c", _STOPPED, url]
            done = subprocess.run(command, text=True, capture_output=True, timeout=30, check=False)
            ended.set()
    finally:
        ended.set()
    assert (done.returncode, done.stderr) == (130, "")


def test_an_endpoint_says_its_context_and_the_tokens_of_a_prompt() -> None:
    with answering(lambda _: "yes", context=8192) as url:
        endpoint = Endpoint.at(url)
        assert (endpoint.model, endpoint.context, endpoint.prompt_tokens("three words here")) == ("recorded", 8192, 3)
        check_contexts((4096, 8192), [endpoint])
        with pytest.raises(
            UserError, match=r"serves a context of 8192 tokens, and prompts of 16384 .* --lengths 4096,"
        ):
            check_contexts((4096, 8192, 16384), [endpoint])
        with pytest.raises(UserError, match="give shorter --lengths"):
            check_contexts((16384,), [Endpoint("http://a"), endpoint])


def test_a_text_that_the_served_context_does_not_hold_is_refused() -> None:
    with (
        answering(lambda text: None if len(text) > 20 else "yes") as url,
        pytest.raises(UserError, match=r"refused a chat request .* give shorter --lengths or serve"),
    ):
        Endpoint.at(url).prompt_tokens("word " * 9)


def test_lengths_are_for_tasks_that_have_them() -> None:
    assert choose(["gsm8k"], None, None) == ()
    assert choose(["gsm8k", "turns"], None, None) == (4096, 8192, 16384)
    assert choose(["ruler"], (1024,), 256) == (1024,)
    with pytest.raises(UserError, match="give --tasks ruler or turns too"):
        choose(["mmlu"], (4096,), None)
    with pytest.raises(UserError, match="1024 tokens leave ruler no room for a text beside answers of 512"):
        choose(["ruler"], (1024, 4096), 512)
