"""Long texts that hide what is asked for, in RULER's forms (Hsieh et al., arXiv:2404.06654), generated here.

A text is as many units as fit by the served model's own tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SPARE = 0.97  # of the tokens: units of other questions differ a little in length
_PROBES = 8, 24  # units
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."  # RULER's own
_SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "zo")


@dataclass(frozen=True)
class Hidden:
    """A text and a question about it.

    `question` stands behind the text or before it; `other` asks for other values of the same text.
    """

    context: str
    question: str
    expected: tuple[str, ...]
    other: tuple[str, tuple[str, ...]] | None = None


Make = Callable[[random.Random, int], Hidden]
"""Of a generator and a number of units."""


def word(rng: random.Random) -> str:
    """A word that no text holds by chance: `bado-rufi`."""
    return "-".join("".join(rng.choices(_SYLLABLES, k=3)) for _ in range(2))


def words(rng: random.Random, count: int) -> list[str]:
    """Different ones."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[word(rng)] = None
    return list(drawn)


def numbers(rng: random.Random, count: int) -> list[str]:
    """Different ones of seven digits."""
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def single(rng: random.Random, units: int) -> Hidden:
    """One needle in noise."""
    (key,), (value,) = words(rng, 1), numbers(rng, 1)
    lines = [NOISE] * units
    lines.insert(rng.randrange(units + 1), needle(key, value))
    return Hidden("\n".join(lines), ask((key,)), (value,))


def multi(rng: random.Random, units: int) -> Hidden:
    """Needles alone, of which two keys are asked for; `other` asks for two more."""
    count = max(units, 4)
    keys, values = words(rng, count), numbers(rng, count)
    lines = [needle(key, value) for key, value in zip(keys, values, strict=True)]
    chosen = rng.sample(range(count), 4)
    first, other = ((tuple(keys[n] for n in part), tuple(values[n] for n in part)) for part in (chosen[:2], chosen[2:]))
    return Hidden("\n".join(lines), ask(first[0]), first[1], (ask(other[0]), other[1]))


def variables(rng: random.Random, units: int) -> Hidden:
    """A chain of five variables that hand one value on, in noise, among another chain."""
    (value, decoy), names = numbers(rng, 2), words(rng, 10)
    names = [name.replace("-", "").upper() for name in names]
    lines = [NOISE] * max(units, 1)
    for start, chain in ((value, names[:5]), (decoy, names[5:])):
        places = sorted(rng.randrange(len(lines) + 1) for _ in chain)
        sources = [start, *(f"VAR {name}" for name in chain)]
        for shift, (place, name) in enumerate(zip(places, chain, strict=True)):
            lines.insert(place + shift, f"VAR {name} = {sources[shift]}")
    question = (
        f"Find all variables that are assigned the value {value} in the text, directly or through other variables. "
        "There are 5 of them. Answer with their names."
    )
    return Hidden("\n".join(lines), question, tuple(names[:5]))


def counted(rng: random.Random, units: int) -> Hidden:
    """A list of words, three of which stand ten times as often as the others, where it is long enough."""
    often = max(2, units // 6)
    seldom = max(1, often // 10)
    drawn = words(rng, 3 + max(1, (units - 3 * often) // seldom))
    listed = drawn[:3] * often + drawn[3:] * seldom
    rng.shuffle(listed)
    question = "What are the 3 words that stand most often in the list? Answer with these words."
    return Hidden("\n".join(listed), question, tuple(drawn[:3]))


def needle(key: str, value: str) -> str:
    """RULER's sentence."""
    return f"One of the special magic numbers for {key} is: {value}."


def ask(keys: Sequence[str]) -> str:
    """For the numbers of the keys."""
    return f"What are the special magic numbers for {' and '.join(keys)} mentioned in the text?"


KINDS: dict[str, Make] = {"single": single, "multi": multi, "variables": variables, "counted": counted}


def units_of(make: Make, tokens: int, message: Callable[[Hidden], str], count: Callable[[str], int]) -> int:
    """How many units fit into a message of `tokens` tokens: at least 1, by the length of two short ones and of a full.

    Args:
        message: what a text becomes.
        count: tokens of a message.

    """

    def length(units: int) -> int:
        return count(message(make(random.Random(0), units)))

    few, many = _PROBES
    low = length(few)
    each = max((length(many) - low) / (many - few), 1e-9)
    units = max(1, int((SPARE * tokens - low) / each) + few)
    while units > 1 and (full := length(units)) > tokens:
        units = max(1, min(units - 1, int(units * SPARE * tokens / full)))
    return units
