"""Small SVG charts in the page's colours: intervals, steps, and a Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from pdtrim_deploy.report.html.markup import Markup, tag

WIDTH = 760
COLOURS = 10  # classes c0, c1, ... of style.css


def svg(width: float, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    """A picture that scrolls by itself if the page is narrower."""
    picture = tag(
        "svg", *parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", width=width, height=height,
        role="img", aria_label=label,
    )  # fmt: skip
    return tag("div", picture, class_="wide chart")


def intervals(rows: Sequence[tuple[str, float, float, float]], label: str) -> Markup:
    """(name, low, value, high) on a logarithmic axis about 1."""
    widest = max(max(high, 1 / low) for _, low, _, high in rows)
    middles = max(max(value, 1 / value) for _, _, value, _ in rows)
    most = max(
        1.1, min(widest, max(2.0, 1.3 * middles))
    )  # an interval may extend beyond the picture, its middle may not
    left, right, step = 170, 130, 26

    def x(ratio: float) -> float:
        at = math.log(min(max(ratio, 1 / most), most)) / math.log(most)
        return round(left + (WIDTH - left - right) * (1 + at) / 2, 1)

    height = step * len(rows) + 44
    parts = [tag("line", x1=x(1), y1=8, x2=x(1), y2=height - 30, class_="axis")]
    for mark in _marks(most):
        parts.append(tag("line", x1=x(mark), y1=8, x2=x(mark), y2=height - 30, class_="grid"))
        parts.append(tag("text", f"{mark:g}x", x=x(mark), y=height - 12, class_="tiny"))
    for number, (name, low, value, high) in enumerate(rows):
        y = 20 + step * number
        sure = "sure" if not low <= 1 <= high else "unsure"
        value_text = f"{value:.3f} ({low:.3f} - {high:.3f})"
        parts += [
            tag("text", name, x=left - 10, y=y + 4, text_anchor="end"),
            tag("line", x1=x(low), y1=y, x2=x(high), y2=y, class_=f"whisker {sure}"),
            tag("circle", tag("title", f"{name}: {value_text}"), cx=x(value), cy=y, r=5, class_=sure),
            tag("text", value_text, x=WIDTH - right + 8, y=y + 4, class_="small"),
        ]
    return svg(WIDTH + 20, height, label, parts)


def _marks(most: float) -> list[float]:
    steps = [mark for mark in (1.05, 1.1, 1.25, 1.5, 2, 3, 5, 10, 20) if mark <= most]
    chosen = steps[-2:] if len(steps) > 1 else steps
    return [1.0, *chosen, *(round(1 / mark, 2) for mark in chosen)]


def trajectory(steps: Sequence[tuple[str, float]], label: str) -> Markup:
    """Loss after each removal; `steps` are (what, loss), such as (`block 5`, 3.2)."""
    left, top, right, bottom, height = 60, 12, 20, 40, 200
    low, high = min(loss for _, loss in steps), max(loss for _, loss in steps)
    room = (high - low) or 1.0

    def place(number: int, loss: float) -> tuple[float, float]:
        across = left + (WIDTH - left - right) * (number + 0.5) / len(steps)
        return round(across, 1), round(top + (height - top - bottom) * (1 - (loss - low) / room), 1)

    points = [place(number, loss) for number, (_, loss) in enumerate(steps)]
    parts = [
        tag("text", f"{high:.3f}", x=left - 6, y=top + 6, text_anchor="end", class_="small"),
        tag("text", f"{low:.3f}", x=left - 6, y=height - bottom + 4, text_anchor="end", class_="small"),
        tag("polyline", points=" ".join(f"{x},{y}" for x, y in points), class_="curve c0"),
    ]
    for (x, y), (unit, loss) in zip(points, steps, strict=True):
        parts.append(tag("circle", tag("title", f"without {unit}: {loss:.4f}"), cx=x, cy=y, r=4, class_="c0"))
        parts.append(tag("text", f"-{unit.removeprefix('block ')}", x=x, y=height - bottom + 20, class_="tiny"))
    return svg(WIDTH, height, label, parts)


def pareto(rows: Sequence[dict[str, Any]], here: tuple[float, float] | None, most_ratio: float = 1.5) -> Markup:
    """Perplexity ratio over KV reduction (logarithmic), one line per method; dashed where colours repeat."""
    left, right, top, bottom, height = 56, 210, 16, 46, 380
    lines: dict[str, dict[float, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["method"] != "dense":
            points = lines.setdefault(row["method"], {}).setdefault(row["asked"] or 0.0, [])
            points.append((row["reduction"], row["ppl_ratio"]))
    most = 1.08 * max([row["reduction"] for row in rows] + ([here[0]] if here else []))

    def place(reduction: float, ratio: float) -> tuple[float, float]:
        across = left + (WIDTH - left - right) * math.log(max(1.0, reduction)) / math.log(most)
        up = (min(ratio, most_ratio) - 0.98) / (most_ratio - 0.98)
        return round(across, 1), round(height - bottom - (height - top - bottom) * up, 1)

    parts: list[Markup] = []
    for ratio in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5):
        (x1, y), (x2, _) = place(1, ratio), place(most, ratio)
        parts.append(tag("line", x1=x1, y1=y, x2=x2, y2=y, class_="grid"))
        parts.append(tag("text", f"{ratio:g}", x=left - 8, y=y + 4, text_anchor="end", class_="small"))
    for mark in (1, 2, 3, 5, 8, 12, 20):
        if mark <= most:
            x, y = place(mark, 0.98)
            parts.append(tag("line", x1=x, y1=top, x2=x, y2=y, class_="grid"))
            parts.append(tag("text", f"{mark}x", x=x, y=y + 16, class_="tiny"))
    parts.append(tag("text", "fewer KV bytes than dense, log scale", x=left, y=height - 6, class_="small"))
    for number, (method, budgets) in enumerate(sorted(lines.items(), key=lambda item: not item[0].startswith("ours"))):
        points = [
            (fmean(r for r, _ in points_of_budget), fmean(p for _, p in points_of_budget))
            for _, points_of_budget in sorted(budgets.items())
        ]
        placed, colour = [place(*point) for point in points], f"c{number % COLOURS}"
        curve = f"curve {colour}" + " dashed" * (number >= COLOURS) + " bold" * method.startswith("ours")
        path = " ".join(f"{x},{y}" for x, y in placed)
        parts.append(tag("polyline", points=path, class_=curve))
        for (x, y), (reduction, ratio) in zip(placed, points, strict=True):
            title = tag("title", f"{method}: {reduction:.2f}x, perplexity x{ratio:.4f}")
            parts.append(tag("circle", title, cx=x, cy=y, r=4, class_=colour))
        line = top + 10 + 22 * number
        left_end, right_end = (f"{WIDTH - right + at},{line - 4}" for at in (8, 30))
        parts.append(tag("polyline", points=f"{left_end} {right_end}", class_=curve))
        parts.append(tag("text", method, x=WIDTH - right + 34, y=line, class_="small"))
    if here:
        x, y = place(*here)
        title = tag("title", f"this bundle: {here[0]:.2f}x, perplexity x{here[1]:.4f}")
        parts.append(tag("rect", title, x=x - 6, y=y - 6, width=12, height=12, class_="here"))
        parts.append(tag("text", "this bundle", x=x - 10, y=y - 10, text_anchor="end", class_="small"))
    return svg(WIDTH, height, "perplexity ratio over KV reduction", parts)
