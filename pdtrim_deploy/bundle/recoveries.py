"""What a bundle keeps of the dense model's scores, as its reports say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = ("eval", "tasks", "served")
"""Reports that hold recoveries, by file stem."""


class Row(NamedTuple):
    """A line of the table, as text."""

    task: str
    items: str
    dense: str
    score: str
    recovery: str
    gate: str
    report: str


HEAD = Row("task", "items", "dense", "this bundle", "recovery ± standard error", "gate", "report")


def recoveries(reports: Path, plan_digest: str) -> list[Row]:
    """Of each report of this plan that is there; of perplexity recovery is the ratio, where less is better."""
    rows = []
    for source in SOURCES:
        try:
            report = json.loads((reports / f"{source}.json").read_text())
        except (FileNotFoundError, ValueError):
            continue
        if report.get("plan_digest") == plan_digest:
            rows += [_row(entry, f"{source}.json") for entry in _entries(report)]
    return rows


def _entries(report: dict[str, Any]) -> list[dict[str, Any]]:
    own = report.get("recovery") or []
    of_tasks = [task.get("recovery") for task in report.get("tasks", ()) if isinstance(task, dict)]
    return [entry for entry in (*(own if isinstance(own, list) else [own]), *of_tasks) if entry]


def _row(entry: dict[str, Any], report: str) -> Row:
    least = entry.get("higher_is_better", not entry["measure"].startswith("nll"))
    recovery, gate = "none: dense scores 0", ""
    if entry["recovery"] is not None:
        recovery = f"{entry['recovery']:.4f}" + ("" if entry["stderr"] is None else f" ± {entry['stderr']:.4f}")
    if entry["gate"] is not None:
        kept = "passed" if entry["passed"] else "FAILED"
        gate = f"{'at least' if least else 'at most'} {entry['gate']:g}: {kept}"
    name = entry["task"] if entry["task"] == "perplexity" else f"{entry['task']}, {entry['measure']}"
    # JSON has no NaN: it is null there.
    dense, score = ("nan" if entry[key] is None else f"{entry[key]:.4f}" for key in ("dense", "score"))
    return Row(name, str(entry["items"]), dense, score, recovery, gate, report)
