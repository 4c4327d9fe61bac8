"""`recall`: conversations that ask for one of many facts of the prompt, made by a seed; nothing is fetched.

Prose seldom needs the middle of a prompt. Here the answer stands at a place that only the question tells.
"""

from __future__ import annotations

import random

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.corpora.base import Document, Log, conversation
from pdtrim_deploy.local.cache import Cache

_COUNT = 2000
_LEAST, _MOST = 5, 60  # facts in a prompt
_THINGS = ("room", "parcel", "locker", "ticket", "account", "shelf", "order", "sample", "visitor", "camera")
_KEPT = ("a red scarf", "two maps", "an old clock", "blue paint", "a set of keys", "three letters", "a glass jar",
         "copper wire", "a green lamp", "a box of tea", "a broken radio", "seven coins")  # fmt: skip
_PLACES = ("the cellar", "the second floor", "the north gate", "the harbour", "the library", "the attic")


class Recall:
    """Documents numbered from 0; each draws from its number alone."""

    usage = "recall"

    def load(self, place: str, cache: Cache, log: Log) -> tuple[Document, ...]:
        """All of them."""
        if place:
            raise UserError(f"corpus recall takes no place, not {place!r}")
        return tuple(_document(number) for number in range(_COUNT))


def _document(number: int) -> Document:
    draw = random.Random(f"recall/{number}")
    thing = draw.choice(_THINGS)
    labels = draw.sample(range(100, 1000), draw.randint(_LEAST, _MOST))
    facts = {label: f"{draw.choice(_KEPT)} from {draw.choice(_PLACES)}" for label in labels}
    lines = [f"The {thing} {label} holds {fact}." for label, fact in facts.items()]
    label = draw.choice(labels)
    question = "\n".join([*lines, "", f"What does the {thing} {label} hold?"])
    return conversation(
        f"recall/{number:04}", [("user", question), ("assistant", f"The {thing} {label} holds {facts[label]}.")]
    )
