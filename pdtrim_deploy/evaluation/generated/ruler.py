"""Long prompts whose answer lies somewhere within: RULER's forms at several lengths, generated (`haystack`).

RULER asks behind the text; here every text is asked about twice, the question first as well: prefill reads what a cut
of its KV drops without knowing the question, or knowing it. sgl-eval 0.1.3 has RULER v2, whose texts come from the hub
and whose answers get part of a point; here an answer is right when it holds every value.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

from pdtrim_deploy.evaluation.generated.base import GeneratedTask, Question, QuestionSet, Setting
from pdtrim_deploy.evaluation.generated.haystack import KINDS, Hidden, units_of

TEXTS = 10  # of each kind and length
PLACES = "last", "first"
_TASK = "Read the text below; the answer to the question is in it."


def message(hidden: Hidden, place: str) -> str:
    """Text and question, the question `first` or `last`."""
    parts = [hidden.question, hidden.context] if place == "first" else [hidden.context, hidden.question]
    return "\n\n".join([_TASK, *parts])


def load(setting: Setting) -> QuestionSet:
    """Kinds, lengths and places take turns, so that the first N questions are of all."""
    return generated("RULER's forms, generated", tuple(_questions(setting)))


def generated(source: str, questions: tuple[Question, ...]) -> QuestionSet:
    """Of questions that were made here; the digest is over their texts, which the tokenizer sizes."""
    texts = "\0".join(part for q in questions for part in (q.problem, q.again or "", q.expected))
    return QuestionSet(source, "Apache-2.0", hashlib.sha256(texts.encode()).hexdigest(), questions)


def _questions(setting: Setting) -> Iterator[Question]:
    sizes = {
        (kind, length): units_of(make, length - setting.answer, lambda hidden: message(hidden, "last"), setting.count)
        for kind, make in KINDS.items()
        for length in setting.lengths
    }
    for number in range(1, TEXTS + 1):
        for (kind, length), units in sizes.items():
            hidden = KINDS[kind](random.Random(f"{kind} {length} {number}"), units)
            for place in PLACES:
                group = f"{kind} {length} {place}"
                problem, expected = message(hidden, place), ", ".join(hidden.expected)
                text = f"{kind} {length} {number}"
                yield Question(f"{group} {number}", problem, expected, hidden.expected, group, subject=text)


def right(question: Question, text: str) -> bool:
    """Whether the answer holds every value; case does not matter."""
    return all(value.lower() in text.lower() for value in question.check)


TASK = GeneratedTask("ruler", load, "{problem}", right, 128, long=True)
