"""KV rules at equal bytes: what each loses of each text, and where that differs from the budget plan."""

from __future__ import annotations

from itertools import groupby
from statistics import fmean
from typing import Any

from tables.base import paired, precision, rise, table, where

TEXTS = {"brown": "Brown", "code": "code", "agents": "agents", "austen": "Austen"}
NEEDLE = "needle"


def equalbytes(data: dict[str, Any] | None) -> str:
    """By model and plan: bytes saved, the rise of perplexity of each text, needles."""
    if data is None:
        return "Not measured yet: `make bench-equalbytes`."
    lines, sizes = [], []
    texts = list(dict.fromkeys(n for row in data["rows"] for n in row["values"] if not n.startswith(NEEDLE)))
    for model, group in groupby(data["rows"], key=lambda row: row["model"]):
        dense, *rows = group
        (needles,) = (name for name in dense["values"] if name.startswith(NEEDLE))
        budgets = {_reduction(row): row["values"] for row in rows if row["plan"].startswith("budget")}
        lines += [
            (
                f"{model} ({precision(model)})",
                row["plan"],
                " / ".join(f"{saved:.2f}x" for saved in row["reduction"].values()),
                *(_cell(row["values"], dense["values"], budgets.get(_reduction(row)), name) for name in texts),
                f"{fmean(row['values'][needles]['exact']):.0%}",
            )
            for row in rows
        ]
        counts = ", ".join(str(len(dense["values"].get(name, {"nll": ()})["nll"])) for name in texts)
        count = len(dense["values"][needles]["exact"])
        sizes.append(f"{model}: {counts} texts, {count} needles, commit {dense['commit']}")
    lengths = " / ".join(f"{int(tokens):,}" for tokens in dense["reduction"])
    heads = [f"{TEXTS[name.split()[0]]}, {int(name.split()[1]):,}" for name in texts]
    return table(("model", "plan", f"bytes saved at {lengths}", *heads, "needles"), lines) + where(
        data["environment"],
        "rise of perplexity over dense on texts of 64 tokens of each final split after prompts of the length in the "
        "head, ± one paired standard error, texts of one document counted as one; needles in Brown's after 512 tokens",
        "higher, lower: than the budget plan's at the same bytes, by more than two paired standard errors; else a tie",
        *sizes,
        model="",
    )


def _reduction(row: dict[str, Any]) -> str:
    """The reduction that a plan was made for, as its name ends; empty for uniform wires."""
    last: str = row["plan"].split()[-1]
    return last if last.endswith("x") else ""


def _cell(values: dict[str, Any], dense: dict[str, Any], budget: dict[str, Any] | None, name: str) -> str:
    if name not in values:
        return "not run"
    documents = dense[name]["documents"]
    cell = rise(values[name]["nll"], dense[name]["nll"], documents)
    if budget is None or budget is values:
        return cell
    mean, error = paired(values[name]["nll"], budget[name]["nll"], documents)
    return cell + (f" ({'higher' if mean > 0 else 'lower'})" if abs(mean) > 2 * error else "")
