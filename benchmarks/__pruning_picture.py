"""The picture of benchmarks/pruning.py: PD perplexity over blocks removed, one line a method, a panel a corpus."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from __strokes import COLOURS, colour, line, stroke, text

WIDTH, HEIGHT, PANEL, LEGEND = 1110, 440, 400, 250
LEFT, TOP, BOTTOM = 60, 34, 50
MOST = 4.0  # times dense; what is worse leaves the picture at its top


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write `path`; methods with several seeds show their mean. Nothing without a dense row to compare with."""
    dense = next((row for row in rows if row["method"] == "dense"), None)
    if dense is None:
        return
    lines = dict[str, dict[int, list[dict[str, Any]]]]()
    for row in rows:
        if row["method"] != "dense":
            lines.setdefault(row["method"], {}).setdefault(row["removed"], []).append(row)
    ordered = sorted(lines.items(), key=lambda item: not item[0].startswith("ours"))
    sizes = sorted({0, *(removed for points in lines.values() for removed in points)})
    most = max(2, *sizes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for panel, (corpus, title) in enumerate((("brown", "Brown, final split"), ("austen", "Jane Austen"))):
        left = LEFT + PANEL * panel
        right = left + PANEL - 70

        def x(removed: float, left: int = left, right: int = right) -> float:
            return left + (right - left) * removed / most

        def y(ratio: float) -> float:
            return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * math.log(min(ratio, MOST)) / math.log(MOST)

        base = dense[f"{corpus}_ppl"]
        parts.append(text(left, TOP - 12, f"{title}: PD perplexity / dense ({base:.1f})", "start"))
        for ratio in (1, 1.25, 1.5, 2, 3, 4):
            parts.append(
                line(left, y(ratio), right, y(ratio), 'stroke="#ddd"') + text(left - 6, y(ratio) + 4, f"{ratio}", "end")
            )
        for removed in range(0, most + 1, 2):
            parts.append(text(x(removed), HEIGHT - BOTTOM + 16, f"{removed}", "middle"))
        parts.append(text((left + right) / 2, HEIGHT - 14, "blocks removed in decode, of 30", "middle"))
        for number, (method, points) in enumerate(ordered):
            width = 3 if method == "ours" else 1.5
            ratios = {n: fmean(row[f"{corpus}_ppl"] for row in rows) / base for n, rows in points.items()}
            at = {0: 1.0, **ratios}
            for first, last in pairwise(sizes):  # no line across a size that was not run
                if first in at and last in at:
                    ends = " ".join(f"{x(n):.1f},{y(at[n]):.1f}" for n in (first, last))
                    parts.append(f'<polyline points="{ends}" {stroke(number)} stroke-width="{width}"/>')
            filled = colour(number) if number < len(COLOURS) else "white"  # as its line is dashed
            parts += [
                f'<circle cx="{x(n):.1f}" cy="{y(ratio):.1f}" r="3" fill="{filled}" stroke="{colour(number)}"/>'
                for n, ratio in ratios.items()
            ]
    for number, (method, _) in enumerate(ordered):
        row = TOP + 10 + 20 * number
        parts.append(line(WIDTH - LEGEND, row - 4, WIDTH - LEGEND + 25, row - 4, stroke(number), 3))
        parts.append(text(WIDTH - LEGEND + 31, row, method, "start"))
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")
