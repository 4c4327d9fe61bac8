"""Prefill blocks run for K and V alone, trained on Brown alone: what least squares and training leave of the loss.

Results of an earlier bench-kvdistil, whose commit they name.
"""

from __future__ import annotations

from typing import Any

from tables.base import quotient, rise, table, where

CORPORA = ("brown", "austen")


def kvdistilbrown(data: dict[str, Any]) -> str:
    """By blocks: the rise over dense of both, and of the trained pair over the fitted; paired by sequence."""
    (dense,) = (row for row in data["rows"] if row["what"] == "dense")
    fitted = {row["blocks"]: row for row in data["rows"] if row["what"] == "least squares"}
    trained = {row["blocks"]: row for row in data["rows"] if row["what"] == "trained"}
    lines = []
    for blocks, before in fitted.items():
        after = trained.get(blocks)
        line = (blocks, _rises(before, dense), _rises(after, dense), _ratios(after, before), _steps(after, data))
        lines.append(line)
    options = data["options"]
    held_out = {row["report"]["sequences"] for row in trained.values()}
    learnt = options["fitted"] - max(held_out, default=0)
    text = (
        f"least squares on {options['refitted']} x {options['length']} tokens of Brown's calibration split, training "
        f"on {learnt}; judged on {options['judged']} x {options['length'] // 2} tokens of Brown's and "
        f"Austen's {options['split']} split after as many prompt tokens; perplexity, ± one paired standard error"
    )
    head = ("blocks of 30", "least squares", "then trained", "trained / least squares", "steps, tokens")
    return table(head, lines) + where(data["environment"], text, f"seed {options['seed']}", f"commit {data['commit']}")


def _rises(row: dict[str, Any] | None, dense: dict[str, Any]) -> str:
    return " / ".join(rise(row[f"{name}_nll"], dense[f"{name}_nll"]) for name in CORPORA) if row else ""


def _ratios(row: dict[str, Any] | None, before: dict[str, Any]) -> str:
    return " / ".join(quotient(row[f"{name}_nll"], before[f"{name}_nll"]) for name in CORPORA) if row else ""


def _steps(row: dict[str, Any] | None, data: dict[str, Any]) -> str:
    if row is None:
        return ""
    report, tokens = row["report"], row["training"]["batch"] * data["options"]["length"]
    kept = "" if report["kept"] else ", not kept"
    return f"{report['steps']}, {report['steps'] * tokens:,}{kept}"
