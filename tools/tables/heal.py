"""Ways of healing at equal CPU time."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from tables.base import difference, table, where

_UNHEALED, _BEFORE = "unhealed", "logits, 1e-4"


def heal(data: dict[str, Any] | None) -> str:
    """Each way's KL and loss on development text, and its KL less that of two others, paired by sequence."""
    if data is None:
        return "Not measured yet: `make bench-heal`."
    rows = {row["way"]: row for row in data["rows"]}
    lines = []
    for name, row in rows.items():
        report = row.get("report")
        steps = ", ".join(f"{phase['steps']} {phase['loss']}" for phase in report["phases"]) if report else ""
        against = [_difference(row, rows.get(other)) for other in (_UNHEALED, _BEFORE)]
        lines.append((name, steps, f"{fmean(row['kl']):.3f}", f"{fmean(row['loss']):.3f}", *against))
    options = data["options"]
    text = (
        "decode without 6 of 30 blocks, prefill without 2, refitted by least squares; trained for "
        f"{options['minutes']:g} CPU minutes on {options['fitted']} x {options['length']} tokens of Brown's "
        f"calibration split; judged on {options['sequences']} x {options['length']} of its development split, "
        "whose first half is prompt: nats a token, and the standard error of the difference paired by sequence"
    )
    head = ("way", "steps", "KL", "loss", "KL less unhealed", f"KL less `{_BEFORE}`")
    return table(head, lines) + where(data["environment"], text)


def _difference(row: dict[str, Any], other: dict[str, Any] | None) -> str:
    if other is None or other is row:
        return ""
    return difference(row["kl"], other["kl"])
