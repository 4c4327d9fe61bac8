"""Chats of two turns with a served model, which sgl-eval 0.1.3 cannot have: the reply to the first is in the second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

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

    def answer(question: Question) -> Answer:
        assert question.again is not None
        assert task.right is not None
        messages = [{"role": "user", "content": question.problem}]
        first = endpoint.reply(messages, max_tokens)
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": question.again}]
        second = endpoint.reply(messages, max_tokens)
        right = task.right(question, second.text)
        return Answer(second.text, second.reason, second.tokens, right, first.text)

    pool = ThreadPoolExecutor(concurrency)
    try:
        answers = {pool.submit(answer, question): question for question in questions}
        for count, future in enumerate(as_completed(answers), 1):
            if error := future.exception():
                if isinstance(error, ServingError):
                    raise ServingError(f"{task.name}, question {answers[future].id}: {error}") from None
                raise error
            note(f"{count}/{len(questions)} answers")
        return [future.result() for future in answers]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
