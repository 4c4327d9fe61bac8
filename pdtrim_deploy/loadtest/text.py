"""Prompts of a wanted length: seeded common English words.

Nearly every BPE vocabulary has one token for each, so a prompt of n words has about n tokens; what is reported is the
server's own count.
"""

from __future__ import annotations

import random

WORDS = """
the of and to in is was for that it with as his on be at by he this had not are but from or have an
they which one you were her all she there would their we him been has when who will more no if out
so said what up its about into than them can only other new some could time these two may then do
first any my now such like our
""".split()  # noqa: SIM905


def text(rng: random.Random, words: int) -> str:
    """`words` words that no other draw begins with, so that the prefix cache gives nothing away."""
    return " ".join(rng.choices(WORDS, k=words))


def named(name: str, words: int) -> str:
    """The one text of this name and length; a shorter one of the same name is its beginning."""
    return text(random.Random(name), words)
