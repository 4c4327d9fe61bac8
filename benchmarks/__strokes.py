"""Colours of lines in a picture, one a method; from the eleventh on they come again, dashed."""

from __future__ import annotations

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#444444", "#8c564b", "#bcbd22")


def colour(number: int) -> str:
    """Of the line `number` and its points."""
    return COLOURS[number % len(COLOURS)]


def stroke(number: int) -> str:
    """The line's attributes besides its width."""
    dashed = ' stroke-dasharray="6 4"' if number >= len(COLOURS) else ""
    return f'stroke="{colour(number)}"{dashed}'
