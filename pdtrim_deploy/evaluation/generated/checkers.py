"""Whether a text keeps a rule of form that a program can check: lengths, words, letters, lists, JSON.

A rule is its checker's name and its arguments: `("words_at_most", 40)`. Words are runs of letters, digits and
apostrophes; matches ignore case, whole words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

Rule: TypeAlias = tuple[Any, ...]
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_BULLET = re.compile(r"^[ \t]*[*\-•][ \t]+\S", re.MULTILINE)
_FENCE = re.compile(r"\A\s*```[a-zA-Z]*\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)


def keeps(rules: Iterable[Rule], text: str) -> bool:
    """Whether a text that is not empty keeps every rule."""
    return bool(text.strip()) and all(CHECKERS[name](text, *arguments) for name, *arguments in rules)


def words_at_least(text: str, count: int) -> bool:
    """A text of `count` words or more."""
    return len(_WORD.findall(text)) >= count


def words_at_most(text: str, count: int) -> bool:
    """A text of `count` words or fewer."""
    return len(_WORD.findall(text)) <= count


def includes(text: str, word: str, count: int = 1) -> bool:
    """`word` stands in the text `count` times or more."""
    return _times(text, word) >= count


def excludes(text: str, word: str) -> bool:
    """`word` does not stand in the text."""
    return _times(text, word) == 0


def bullets(text: str, count: int) -> bool:
    """Exactly `count` lines begin with `*`, `-` or a bullet."""
    return len(_BULLET.findall(text)) == count


def paragraphs(text: str, count: int) -> bool:
    """Exactly `count` paragraphs, with a blank line between."""
    return len([part for part in re.split(r"\n\s*\n", text) if part.strip()]) == count


def lower(text: str) -> bool:
    """Letters, none of them a capital."""
    return text == text.lower() and any(map(str.isalpha, text))


def upper(text: str) -> bool:
    """Letters, capitals alone."""
    return text == text.upper() and any(map(str.isalpha, text))


def json_keys(text: str, *keys: str) -> bool:
    """A JSON object with these very keys, and nothing else but a fence."""
    fenced = _FENCE.match(text)
    try:
        value = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(value) == set(keys)


def ends(text: str, phrase: str) -> bool:
    """The last thing in the text is `phrase`, in its very letters."""
    return text.rstrip("\"'*_” \n").endswith(phrase)


def no_commas(text: str) -> bool:
    """Not a single comma."""
    return "," not in text


def _times(text: str, word: str) -> int:
    words = (part.lower().replace("’", "'") for part in _WORD.findall(text))
    return sum(word.lower() in (part, part.removesuffix("'s")) for part in words)


CHECKERS: dict[str, Callable[..., bool]] = {
    checker.__name__: checker
    for checker in (
        words_at_least, words_at_most, includes, excludes, bullets, paragraphs, lower, upper, json_keys, ends,
        no_commas,
    )
}  # fmt: skip
