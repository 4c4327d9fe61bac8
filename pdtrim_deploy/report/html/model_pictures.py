"""What the build saw in the model: how redundant each block is, and where each decode layer looks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pdtrim_deploy.report.html.charts import svg
from pdtrim_deploy.report.html.markup import Markup, join, tag

CELL, LEFT, TOP, HEIGHT = 26, 58, 14, 170
PARTS = {
    "first": ("c1", "first prompt tokens"),
    "last": ("c2", "last prompt tokens"),
    "middle": ("c0", "the prompt between them"),
    "generated": ("c6", "generated tokens"),
}


def redundancy_picture(cosine: Sequence[float], pairs: Sequence[float], gone: Mapping[str, Collection[int]]) -> Markup:
    """A bar a block, its cosine; a mark a pair; filled as the block fares: kept, dropped by decode, by both."""
    low = min(0.0, *cosine, *pairs) if min((*cosine, *pairs)) < 0.5 else min((*cosine, *pairs)) - 0.02
    kinds = {"keep": "kept", "sparse": "dropped by decode", "distilled": "dropped by prefill and decode"}

    def y(value: float) -> float:
        return round(TOP + HEIGHT * (1 - (value - low) / (1 - low)), 1)

    parts = _axis(len(cosine), (1.0, (1 + low) / 2, low), y)
    for block, value in enumerate(cosine):
        kind = "distilled" if block in gone["prefill"] else "sparse" if block in gone["decode"] else "keep"
        title = tag("title", f"block {block}: cos {value:.4f}, {kinds[kind]}")
        x, top = LEFT + block * CELL + 3, y(value)
        parts.append(tag("rect", title, x=x, y=top, width=CELL - 6, height=max(1.0, y(low) - top), class_=kind))
    for first, value in enumerate(pairs):
        x, title = LEFT + (first + 1) * CELL, tag("title", f"blocks {first} and {first + 1}: cos {value:.4f}")
        parts.append(tag("circle", title, cx=x, cy=y(value), r=3, class_="here"))
    picture = svg(LEFT + len(cosine) * CELL + 6, TOP + HEIGHT + 26, "redundancy of each block", parts)
    entries = [*((kind, text) for kind, text in kinds.items()), ("dot", "a block and its successor together")]
    return tag("figure", picture, _legend(entries))


def attention_picture(mass: Mapping[str, Any]) -> Markup:
    """A bar a decode layer, cut into the shares of PARTS; blocks that decode dropped leave a gap."""
    blocks = mass["blocks"]

    def y(share: float) -> float:
        return round(TOP + HEIGHT * (1 - share), 1)

    parts = _axis(max(blocks) + 1, (1.0, 0.5, 0.0), y)
    for layer, block in enumerate(blocks):
        x, below = LEFT + block * CELL + 3, 0.0
        shares = ", ".join(f"{part} {mass[part][layer]:.1%}" for part in PARTS)
        bars = []
        for part, (colour, _) in PARTS.items():
            share = mass[part][layer]
            tall = max(0.0, round(y(below) - y(below + share), 1))
            bars.append(tag("rect", x=x, y=y(below + share), width=CELL - 6, height=tall, class_=colour))
            below += share
        parts.append(tag("g", tag("title", f"block {block}: {shares}"), *bars))
    picture = svg(LEFT + (max(blocks) + 1) * CELL + 6, TOP + HEIGHT + 26, "attention of each decode layer", parts)
    return tag("figure", picture, _legend(list(PARTS.values())))


def _axis(blocks: int, marks: Sequence[float], y: Any) -> list[Markup]:
    parts = []
    for mark in marks:
        parts.append(tag("line", x1=LEFT, y1=y(mark), x2=LEFT + blocks * CELL, y2=y(mark), class_="grid"))
        parts.append(tag("text", f"{mark:.2f}", x=LEFT - 8, y=y(mark) + 4, text_anchor="end", class_="small"))
    return parts + [
        tag("text", block, x=LEFT + block * CELL + CELL / 2, y=TOP + HEIGHT + 16, class_="tiny")
        for block in range(blocks)
    ]


def _legend(entries: Sequence[tuple[str, str]]) -> Markup:
    return tag("p", join(tag("span", tag("i", " ", class_=kind), text) for kind, text in entries), class_="legend")
