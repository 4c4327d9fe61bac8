"""Conversations of two turns about a long text: what the KV of the first turn must still hold in the second.

The first turn gives needles and asks for two; the model's own reply stands before the second turn. Group `same` asks
the same again, which a right first reply holds; group `other` asks for two that nobody asked for before. The second
reply is graded.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from pdtrim_deploy.evaluation.generated.base import GeneratedTask, Question, QuestionSet, Setting
from pdtrim_deploy.evaluation.generated.haystack import Hidden, multi, units_of
from pdtrim_deploy.evaluation.generated.ruler import generated, message, right

TEXTS = 20  # of each length and group
OVERHEAD = 64  # tokens of the second question and of the chat template


def load(setting: Setting) -> QuestionSet:
    """Lengths and groups take turns."""
    return generated("needles of RULER's form in conversations, generated", tuple(_questions(setting)))


def _questions(setting: Setting) -> Iterator[Question]:
    room = 2 * setting.answer + OVERHEAD
    sizes = {length: units_of(multi, length - room, _first, setting.count) for length in setting.lengths}
    for number in range(1, TEXTS + 1):
        for length, units in sizes.items():
            hidden = multi(random.Random(f"turns {length} {number}"), units)
            assert hidden.other is not None
            asks = {"same": ("Once more: " + hidden.question, hidden.expected), "other": hidden.other}
            for name, (again, values) in asks.items():
                group = f"{name} {length}"
                expected, text = ", ".join(values), f"{length} {number}"
                yield Question(f"{group} {number}", _first(hidden), expected, values, group, again, text)


def _first(hidden: Hidden) -> str:
    return message(hidden, "last")


TASK = GeneratedTask("turns", load, "{problem}", right, 128, long=True)
