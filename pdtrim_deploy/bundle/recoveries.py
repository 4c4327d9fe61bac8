"""What a bundle keeps of the dense model's scores, as its reports say.

A report holds the tasks of the last command that wrote it. `recoveries.json` beside them keeps the last row of every
task, so that a gate that failed does not vanish when another task is measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pdtrim_deploy.local.atomic import write_atomic

KEPT = "recoveries.json"
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


def recoveries(reports: Path, plan_digest: str, gates: Mapping[str, float]) -> list[Row]:
    """Of each task of this plan that was measured; of perplexity recovery is the ratio, where less is better.

    Behind them the recipe's gates, by task, that no report has judged.
    """
    entries = [(source, entry) for source in SOURCES for entry in _known(reports, plan_digest)[source].values()]
    judged = {(entry["task"], entry["gate"]) for _, entry in entries}
    return [
        *(_row(entry, f"{source}.json") for source, entry in entries),
        *(
            Row(name, "", "", "", "not measured", f"{gate:g}: not measured", "")
            for name, gate in gates.items()
            if (name, gate) not in judged
        ),
    ]


def keep_recoveries(reports: Path, plan_digest: str) -> None:
    """Write `recoveries.json` from what it held of this plan and what the reports say now, if anything."""
    known = _known(reports, plan_digest)
    if any(known.values()):
        write_atomic(reports / KEPT, json.dumps({"plan_digest": plan_digest, "tasks": known}, indent=1) + "\n")


def _known(reports: Path, plan_digest: str) -> dict[str, dict[str, dict[str, Any]]]:
    """By report and task, the last entry."""
    kept = _of_plan(reports / KEPT, plan_digest).get("tasks", {})
    known = {source: dict(kept.get(source, {})) for source in SOURCES}
    for source in SOURCES:
        known[source] |= {entry["task"]: entry for entry in _entries(_of_plan(reports / f"{source}.json", plan_digest))}
    return known


def _of_plan(path: Path, plan_digest: str) -> dict[str, Any]:
    """A report; empty where there is none of this plan."""
    try:
        report = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return report if isinstance(report, dict) and report.get("plan_digest") == plan_digest else {}


def _entries(report: dict[str, Any]) -> list[dict[str, Any]]:
    of_text = report.get("recovery") or []
    of_tasks = [task.get("recovery") for task in report.get("tasks", ()) if isinstance(task, dict)]
    entries = [entry for entry in (*(of_text if isinstance(of_text, list) else [of_text]), *of_tasks) if entry]
    calibrated_on = report.get("calibrated_on") or ()
    return [entry | ({"calibrated_on": True} if entry["task"] in calibrated_on else {}) for entry in entries]


def _row(entry: dict[str, Any], report: str) -> Row:
    least = entry["higher_is_better"]
    recovery, gate = "none: dense scores 0", ""
    if entry["recovery"] is not None:
        recovery = f"{entry['recovery']:.4f}" + ("" if entry["stderr"] is None else f" ± {entry['stderr']:.4f}")
    if entry["gate"] is not None:
        kept = "passed" if entry["passed"] else "FAILED"
        gate = f"{'at least' if least else 'at most'} {entry['gate']:g}: {kept}"
    name = entry["task"] if entry["task"] == "perplexity" else f"{entry['task']}, {entry['measure']}"
    name += " (calibrated on some of its questions)" if entry.get("calibrated_on") else ""
    # JSON has no NaN: it is null there.
    dense, score = ("nan" if entry[key] is None else f"{entry[key]:.4f}" for key in ("dense", "score"))
    return Row(name, str(entry["items"]), dense, score, recovery, gate, report)
