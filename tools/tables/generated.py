"""Answers that served pairs generate, beside the dense model's."""

from __future__ import annotations

import operator
from math import comb
from typing import Any

from tables.base import paired, precision, table, tie, where

MODEL = "Qwen2.5-Coder-0.5B"
_TASKS = {"humaneval": "HumanEval", "gsm8k": "GSM8K", "instructions": "instructions about form"}


def generated(data: dict[str, Any] | None) -> str:
    """For each task and plan the right answers, beside dense on the same questions."""
    if data is None:
        return "Not measured yet: `make bench-generated` writes it."
    dense = {row["task"]: row for row in data["rows"] if row["plan"] == "dense"}
    lines = []
    for task, name in _TASKS.items():
        for row in (row for row in data["rows"] if row["task"] == task):
            cells = _beside(row["right"], dense[task]["right"]) if row is not dense[task] else ("", "")
            right = f"{sum(row['right'])} of {len(row['right'])}"
            lines.append((name, row["plan"], f"{row['reduction']:.2f}x", right, *cells, row["cut"], row["commit"]))
    options = data["options"]
    head = ("task", "plan", "KV bytes saved", "right", "minus dense, points", "McNemar's p", "cut", "commit")
    return table(head, lines) + where(
        data["environment"],
        f"{MODEL}-Instruct, weights dequantised from a {precision(MODEL)} file, in float32",
        "one greedy answer of each question through SGLang's workers and router; bytes at 512 prompt tokens, against a "
        "bfloat16 pool; ± is the "
        f"paired standard error; cut: answers that reached the limit of {options['max_tokens']} tokens",
        model="",
    )


def _beside(right: list[int], dense: list[int]) -> tuple[str, str]:
    """Difference in points with its error, and the exact two-sided p of McNemar's test."""
    mean, error = paired([100 * value for value in right], [100 * value for value in dense])
    won, lost = (sum(map(operator.gt, *sides)) for sides in ((right, dense), (dense, right)))
    tail = sum(comb(won + lost, count) for count in range(min(won, lost) + 1)) / 2 ** (won + lost)
    return f"{mean:+.1f} ± {error:.1f}{tie(mean, error)}", f"{min(1.0, 2 * tail):.2f}" if tail >= 0.005 else "< 0.01"
