"""Prompts of a given length, from seeded common English words.

Nearly every BPE vocabulary has one token for each word, so a prompt of n words has about n tokens; results report the
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
    """`words` words whose beginning no other prompt shares, so that the prefix cache has no hits."""
    return " ".join(rng.choices(WORDS, k=words))


def named(name: str, words: int) -> str:
    """The text of this name and length; a shorter text of the same name is a prefix of it."""
    return text(random.Random(name), words)
