"""`choice`: a question's several answers of several tokens each, scored as continuations (Social IQa).

The prompt is solved examples and then the question, cut on the left to exactly `prompt` tokens (BOS, where the
tokenizer has one, stays their first), so that cutting KV has something to cut and prompts batch. An answer's first
token is judged by prefill, its others by decode.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.sampling import beginning
from pdtrim_deploy.evaluation.tasks.base import Part, Setting, Task, Values
from pdtrim_deploy.evaluation.tasks.judge import Judgement
from pdtrim_deploy.evaluation.tasks.social_iqa import Question, load

PROMPT, SIZE = 512, 200
_LEAD = "Answer:"


def read(continuations: Tensor, lengths: Tensor, judgement: Judgement) -> Values:
    """The right answer stands first.

    `accuracy` chooses by the sum of log-probabilities, `accuracy_norm` by their mean per token; a tie is wrong.
    `right_nll` is the right answer's mean NLL in nats a token: it moves before an accuracy of so few items does.
    """
    total = judgement.logprobs.double().sum(-1)
    mean = total / lengths
    return {
        "accuracy": (total[:, :1] > total[:, 1:]).all(-1).double(),
        "accuracy_norm": (mean[:, :1] > mean[:, 1:]).all(-1).double(),
        "right_nll": -mean[:, 0],
    }


def prepare(
    setting: Setting,
    prompt: int = PROMPT,
    questions: tuple[Sequence[Question], Sequence[Question]] | None = None,
) -> Task:
    """`setting.size` questions (200) drawn by seed; examples are drawn anew for each, from other questions.

    Args:
        prompt: tokens of every prompt.
        questions: examples and judged ones; Social IQa's when left out.

    Raises:
        UserError: Social IQa cannot be had, or it has too few questions.

    """
    examples, judged = questions or load(setting.cache, setting.note)
    count = setting.size or SIZE
    if count > len(judged):
        raise UserError(f"task choice has {len(judged)} questions, not {count}; ask for fewer")
    rng = random.Random(setting.seed)
    items = []
    for question in rng.sample(list(judged), count):
        ordered = [question.choices[question.right], *_wrong(question)]
        answers = [continuation(setting.tokenizer, _LEAD, choice) for choice in ordered]
        items.append((_prompt(question, rng.sample(list(examples), len(examples)), setting.tokenizer, prompt), answers))
    items.sort(key=lambda item: max(map(len, item[1])))  # answers of like length share a batch: less padding
    part = Part.of(torch.tensor([ids for ids, _ in items]), [answers for _, answers in items], ["all"] * count)
    return Task("choice", (part,), read)


def continuation(tokenizer: Any, lead: str, text: str) -> list[int]:
    """Tokens of ` text` as they stand after `lead`."""
    return _encoded(tokenizer, f"{lead} {text}")[len(_encoded(tokenizer, lead)) :]


def _wrong(question: Question) -> list[str]:
    return [choice for at, choice in enumerate(question.choices) if at != question.right]


def _prompt(question: Question, examples: list[Question], tokenizer: Any, length: int) -> list[int]:
    """The last `length` tokens of as many solved examples as that takes, and the question; BOS is one of them."""
    bos, ids = beginning(tokenizer), _encoded(tokenizer, f"{question.text}\n{_LEAD}")
    room = length - len(bos)
    for example in examples:
        if len(ids) >= room:
            return bos + ids[-room:]
        ids = _encoded(tokenizer, f"{example.text}\n{_LEAD} {example.choices[example.right]}\n\n") + ids
    if len(ids) >= room:
        return bos + ids[-room:]
    raise UserError(f"task choice: {len(examples)} examples do not fill a prompt of {length} tokens; ask for a shorter")


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
