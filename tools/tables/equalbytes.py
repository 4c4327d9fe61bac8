"""KV rules at equal bytes: what each loses of each text, and where that differs from the budget plan."""

from __future__ import annotations

from math import exp, sqrt
from statistics import fmean, stdev
from typing import Any

from tables.base import table, where

TEXTS = {"brown": "Brown", "code": "code", "agents": "agents", "austen": "Austen"}
NEEDLE = "needle"


def equalbytes(data: dict[str, Any] | None) -> str:
    """By plan: bytes saved, the rise of perplexity of each text, needles."""
    if data is None:
        return "Not measured yet: `make bench-equalbytes`."
    dense, *rows = data["rows"]
    budgets = {_reduction(row): row["values"] for row in rows if row["plan"].startswith("budget")}
    texts = [name for name in dense["values"] if not name.startswith(NEEDLE)]
    lines = [
        (
            row["plan"],
            " / ".join(f"{saved:.2f}x" for saved in row["reduction"].values()),
            *(_cell(row["values"], dense["values"], budgets.get(_reduction(row)), name) for name in texts),
            *(f"{fmean(values['exact']):.0%}" for name, values in row["values"].items() if name.startswith(NEEDLE)),
        )
        for row in rows
    ]
    lengths = " / ".join(f"{int(tokens):,}" for tokens in dense["reduction"])
    heads = [f"{TEXTS[name.split()[0]]}, {int(name.split()[1]):,}" for name in texts]
    counts = ", ".join(str(len(dense["values"][name]["nll"])) for name in texts)
    (needles,) = (len(values["exact"]) for name, values in dense["values"].items() if name.startswith(NEEDLE))
    return table(("plan", f"bytes saved at {lengths}", *heads, "needles"), lines) + where(
        data["environment"],
        f"rise of perplexity over dense on {counts} texts of 64 tokens of each final split behind prompts of so many "
        f"tokens, ± one paired standard error; {needles} needles in Brown's behind 512",
        "higher, lower: than the budget plan's at the same bytes, by more than two paired standard errors; else a tie",
        f"commit {data['commit']}",
    )


def _reduction(row: dict[str, Any]) -> str:
    """The reduction that a plan was made for, as its name ends; empty for uniform wires."""
    last: str = row["plan"].split()[-1]
    return last if last.endswith("x") else ""


def _cell(values: dict[str, Any], dense: dict[str, Any], budget: dict[str, Any] | None, name: str) -> str:
    mean, error = _paired(values[name]["nll"], dense[name]["nll"])
    cell = f"{exp(mean) - 1:.1%} ± {exp(mean) * error:.1%}"
    if budget is None or budget is values:
        return cell
    mean, error = _paired(values[name]["nll"], budget[name]["nll"])
    return cell + (f" ({'higher' if mean > 0 else 'lower'})" if abs(mean) > 2 * error else "")


def _paired(losses: list[float], others: list[float]) -> tuple[float, float]:
    differences = [loss - other for loss, other in zip(losses, others, strict=True)]
    return fmean(differences), stdev(differences) / sqrt(len(differences))
