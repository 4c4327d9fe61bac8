"""What the steps of a build take, before and after."""

from __future__ import annotations

from statistics import median
from typing import Any

from tables.base import precision, table, where

_SHOWN = 1.0  # seconds: shorter steps are in the sum alone


def build(data: dict[str, Any] | None) -> str:
    """For each model and step, medians over rounds, the earlier commit's first."""
    if data is None:
        return "No figures of it are committed yet."
    before, rows = data["options"]["before"], data["rows"]
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        sides = [[row for row in of_model if (row["commit"] == before) is earlier] for earlier in (True, False)]
        steps = dict.fromkeys(row["step"] for side in sides for row in side)
        each = {step: [[row for row in side if row["step"] == step] for side in sides] for step in steps}
        same = "same plan" if len({row["plan"] for side in sides for row in side}) == 1 else "other plan"
        for step, parts in each.items():
            if max(_of(part, "seconds") for part in parts) >= _SHOWN:
                lines.append((f"{model} ({precision(model)})", step, *_cells(parts)))
        lines.append((f"{model} ({precision(model)})", f"all, {same}", *_cells(sides)))
    options = data["options"]
    rounds = "one build each" if options["rounds"] == 1 else f"medians of {options['rounds']} builds"
    text = (
        f"greedy search on {options['sequences']} x {options['length']} tokens of Brown's calibration split; KV budget "
        f"of 4.95 on {options['kv_sequences']} sequences; `{before}` / `{data['commit']}`, in turns; "
        f"{rounds}; peak memory is this process' resident bytes; block calls are each of a batch, "
        "of which block-forwards count the sequences"
    )
    head = ("model", "step", "seconds", "CPU-seconds", "peak MB", "block calls")
    return table(head, lines) + where(data["environment"], text, model="")


def _of(rows: list[dict[str, Any]], figure: str) -> float:
    return median(row[figure] for row in rows) if rows else 0.0


def _cells(sides: list[list[dict[str, Any]]]) -> list[str]:
    """`before / after` of each figure; of several steps the sum, of memory the largest."""
    cells = []
    for figure in ("seconds", "cpu_seconds", "peak_mb", "block_calls"):
        names = dict.fromkeys(row["step"] for side in sides for row in side)
        values = [[_of([row for row in side if row["step"] == name], figure) for name in names] for side in sides]
        totals = [max(side) if figure == "peak_mb" else sum(side) for side in values]
        cells.append(" / ".join(f"{total:,.0f}" for total in totals))
    return cells
