"""Where the time of a search goes."""

from __future__ import annotations

from typing import Any

from tables.base import precision, table, where


def searchtime(data: dict[str, Any] | None) -> str:
    """For each model and part: CPU-seconds, rate of its products, and what these alone would take."""
    if data is None:
        return "No figures of it are committed yet."
    lines = list[tuple[object, ...]]()
    for model in dict.fromkeys(row["model"] for row in data["rows"]):
        rows, name = [row for row in data["rows"] if row["model"] == model], f"{model} ({precision(model)})"
        total, least = sum(row["cpu_seconds"] for row in rows), sum(map(_least, rows))
        for row in rows:
            lines.append((name, row["part"], *_cells(row), f"{row['cpu_seconds'] / total:.0%}"))
        products = sum(row["operations"] for row in rows)
        lines.append((name, "all", f"{total:.0f}", f"{products / 1e12:.2f}", "", "", f"{least:.0f}", "100%"))
    options = data["options"]
    text = (
        f"greedy search of both stages, the pass over all blocks in front of it included, on {options['sequences']} x "
        f"{options['length']} tokens of Brown's calibration split; one thread, CPU-seconds; operations are those of "
        "matrix products with weights, attention's not counted; plain products are of the same shapes, the fastest of "
        "some rounds; least: the operations at that rate"
    )
    head = (
        "model",
        "part",
        "CPU-seconds",
        "10^12 operations",
        "10^9 a second",
        "plain products",
        "least seconds",
        "share",
    )
    return table(head, lines) + where(data["environment"], text, model="")


def _least(row: dict[str, Any]) -> float:
    return float(row["operations"] / row["plain_rate"]) if row["operations"] else 0.0


def _cells(row: dict[str, Any]) -> list[str]:
    seconds, operations = row["cpu_seconds"], row["operations"]
    if not operations:
        return [f"{seconds:.0f}", "", "", "", ""]
    rates = [f"{rate / 1e9:.0f}" for rate in (operations / seconds, row["plain_rate"])]
    return [f"{seconds:.0f}", f"{operations / 1e12:.2f}", *rates, f"{_least(row):.0f}"]
