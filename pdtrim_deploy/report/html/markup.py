"""HTML and SVG as escaped text; what this makes is well-formed XML too."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """`tag("td", "a < b", class_="num")`: children are escaped unless they are Markup; `_` in names becomes `-`."""
    attribute_text = "".join(
        f' {key.strip("_").replace("_", "-") if key != "viewBox" else key}="{escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = join(children)
    return Markup(
        f"<{name}{attribute_text}>{inner}</{name}>" if inner or name not in _VOID else f"<{name}{attribute_text}/>"
    )


_VOID = {"meta", "line", "rect", "circle", "polyline", "path", "br", "col"}


def join(parts: Iterable[object]) -> Markup:
    """Parts one after another."""
    return Markup("".join(part if isinstance(part, Markup) else escape(_plain(part)) for part in parts))


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> Markup:
    """A table that scrolls within itself where the page is narrow; cells after a row's first are right-aligned."""
    body = [tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in rest)) for first, *rest in rows]
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    return tag("div", tag("table", top, tag("tbody", *body)), class_="wide")


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
