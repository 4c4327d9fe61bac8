"""Chats of two turns with a served model, which sgl-eval 0.1.3 cannot have: the reply to the first is in the second."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence

from pdtrim_deploy.errors import ServingError
from pdtrim_deploy.evaluation.generated.base import Answer, GeneratedTask, Question
from pdtrim_deploy.evaluation.generated.endpoint import Endpoint


def converse(
    url: str,
    task: GeneratedTask,
    questions: Sequence[Question],
    max_tokens: int,
    concurrency: int,
    note: Callable[[str], None] = lambda _: None,
) -> list[Answer]:
    """Greedy replies of the model at `url` to the second turns, in the order of the questions.

    Raises:
        ServingError: a turn got no reply.

    """
    endpoint = Endpoint.at(url)

    waiting, done = queue.SimpleQueue[int](), queue.SimpleQueue[tuple[int, Answer | Exception]]()

    def answer(question: Question) -> Answer:
        assert question.again is not None
        assert task.right is not None
        messages = [{"role": "user", "content": question.problem}]
        first = endpoint.reply(messages, max_tokens)
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": question.again}]
        second = endpoint.reply(messages, max_tokens)
        right = task.right(question, second.text)
        return Answer(second.text, second.reason, second.tokens, right, first.text)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                place = waiting.get_nowait()
                try:
                    done.put((place, answer(questions[place])))
                except Exception as error:
                    done.put((place, error))

    for place in range(len(questions)):
        waiting.put(place)
    for _ in range(min(concurrency, len(questions))):
        threading.Thread(target=work, daemon=True).start()  # no daemon would keep a stopped program until its reply
    answers = dict[int, Answer]()
    try:
        while len(answers) < len(questions):
            place, outcome = done.get()
            if isinstance(outcome, ServingError):
                raise ServingError(f"{task.name}, question {questions[place].id}: {outcome}") from None
            if isinstance(outcome, Exception):
                raise outcome
            answers[place] = outcome
            note(f"{len(answers)}/{len(questions)} answers")
    finally:
        with contextlib.suppress(queue.Empty):  # ask no more
            while True:
                waiting.get_nowait()
    return [answers[place] for place in range(len(questions))]
