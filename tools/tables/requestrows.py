"""Rows chosen by request beside first and last rows."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from tables.base import difference, rise, table, where


def requestrows(data: dict[str, Any] | None) -> str:
    """Of each plan and rule: reduction with row lists, perplexity, its difference from first and last rows, needles."""
    if data is None:
        return "Not measured yet: `make bench-requestrows` writes it."
    rows = {(row["plan"], row["rule"]): row for row in data["rows"]}
    dense, lines = rows.pop(("dense", "-")), []
    for (plan, rule), row in rows.items():
        usual = rows[plan, "first and last"]
        differs = "" if row is usual else difference(row["nll"], usual["nll"])
        codes = f"{fmean(row['needle']):.0%}"
        lines.append((plan, rule, f"{row['reduction']:.2f}x", rise(row["nll"], dense["nll"]), differs, codes))
    options = data["options"]
    head = ("plan", "rows", "reduction", "perplexity, against dense", "against first and last, nats a token", "needle")
    return table(head, lines) + where(
        data["environment"],
        f"{len(dense['nll'])} continuations of 64 tokens of Brown's development split, {len(dense['needle'])} needles, "
        f"after {options['prompt']}-token prompts; dense finds {fmean(dense['needle']):.0%}",
        f"SnapKV: scores of the last {options['window']} queries, smoothed over 5 rows, its row lists counted",
        "± is the standard error of the difference paired by sequence",
    )
