"""Lines and texts of a picture; colours of lines, one a method: from the eleventh on they come again, dashed."""

from __future__ import annotations

from xml.sax.saxutils import escape

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#444444", "#8c564b", "#bcbd22")


def colour(number: int) -> str:
    """Of the line `number` and its points."""
    return COLOURS[number % len(COLOURS)]


def stroke(number: int) -> str:
    """The line's attributes besides its width."""
    dashed = ' stroke-dasharray="6 4"' if number >= len(COLOURS) else ""
    return f'stroke="{colour(number)}"{dashed}'


def line(x1: float, y1: float, x2: float, y2: float, stroke: str, width: float = 1) -> str:
    """From one point to another."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {stroke} stroke-width="{width}"/>'


def text(x: float, y: float, text: str, anchor: str) -> str:
    """At a point, which is its start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222">{escape(text)}</text>'
