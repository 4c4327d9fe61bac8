"""The Pareto picture of benchmarks/kv.py: perplexity ratio over reduction, one line a method, as plain SVG."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Any

from __strokes import colour, line, stroke, text

WIDTH, HEIGHT = 860, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 230, 24, 56
MOST = 1.5  # larger losses leave the picture at its top


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write `path`; methods with several seeds show their mean."""
    lines = dict[str, dict[float, list[tuple[float, float]]]]()
    for row in rows:
        if row["method"] != "dense":
            points = lines.setdefault(row["method"], {})
            points.setdefault(row["asked"] or 0.0, []).append((row["reduction"], row["ppl_ratio"]))
    most = max(row["reduction"] for row in rows) * 1.08

    def x(reduction: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(reduction) / math.log(most)

    def y(ratio: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (min(ratio, MOST) - 0.98) / (MOST - 0.98)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="white"/>'
    ]
    for ratio in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5):
        parts.append(
            line(LEFT, y(ratio), WIDTH - RIGHT, y(ratio), 'stroke="#ddd"')
            + text(LEFT - 8, y(ratio) + 4, f"{ratio}", "end")
        )
    for reduction in (1, 2, 3, 4.95, 8, 12):
        if reduction <= most:
            parts.append(line(x(reduction), TOP, x(reduction), HEIGHT - BOTTOM, 'stroke="#ddd"'))
            parts.append(text(x(reduction), HEIGHT - BOTTOM + 18, f"{reduction:g}x", "middle"))
    parts.append(
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "fewer KV bytes than dense bfloat16 (log scale)", "middle")
    )
    parts.append(text(LEFT, TOP - 8, "perplexity ratio to dense", "start"))
    for number, (method, by_budget) in enumerate(
        sorted(lines.items(), key=lambda item: not item[0].startswith("ours"))
    ):
        points = [tuple(mean(axis) for axis in zip(*places, strict=True)) for _, places in sorted(by_budget.items())]
        path_ = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        width = 3 if method.startswith("ours") else 1.5
        parts.append(f'<polyline points="{path_}" fill="none" {stroke(number)} stroke-width="{width}"/>')
        parts += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="4" fill="{colour(number)}"/>' for a, b in points]
        at = TOP + 14 + 22 * number
        parts.append(line(WIDTH - RIGHT + 16, at - 4, WIDTH - RIGHT + 40, at - 4, stroke(number), width))
        parts.append(text(WIDTH - RIGHT + 46, at, method, "start"))
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")
