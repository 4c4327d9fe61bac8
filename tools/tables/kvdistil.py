"""Prefill blocks run for K and V alone, trained, and quantised wires behind them: what each pair loses of each text."""

from __future__ import annotations

from math import exp, sqrt
from statistics import fmean
from typing import Any

from tables.base import commits, paired, rise, table, where

CORPORA = {"brown": "Brown", "austen": "Austen", "code": "code", "agents": "agents"}
TEXTS = {"brown": "Brown", "mixed": "mixed"}
Losses = dict[str, dict[str, Any]]
"""By corpus, a row with the losses of each text, nats a token."""


def kvdistil(data: dict[str, Any] | None) -> str:
    """Of final text."""
    return _table(data, "final")


def kvdistilchoice(data: dict[str, Any] | None) -> str:
    """Of development text, which settings are chosen by."""
    return _table(data, "development")


def pairs(data: dict[str, Any], split: str) -> list[tuple[dict[str, Any], Losses, Losses]]:
    """Of each pair judged on texts of all corpora: a row, its losses, those of the dense pair of the same commit.

    Raises:
        SystemExit: a commit that judged no dense pair with native rows.

    """
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in data["rows"]:
        if row["split"] == split:
            grouped.setdefault(repr((row["setting"], row["kv"], row["commit"])), []).append(row)
    whole = [rows for rows in grouped.values() if {row["corpus"] for row in rows} == set(CORPORA)]
    whole.sort(key=lambda rows: (rows[0]["setting"]["blocks"], rows[0]["setting"].get("steps", 0), rows[0]["saved"]))
    judged = [(rows[0], {row["corpus"]: row for row in rows}) for rows in whole]
    dense = {row["commit"]: losses for row, losses in judged if _dense(row)}
    if lacking := [row["commit"] for row, _ in judged if row["commit"] not in dense]:
        raise SystemExit(
            f"results/kvdistil.json: {commits(lacking)} judged no dense pair with native rows on {split} text; run "
            f"benchmarks/kvdistil.py --split {split}"
        )
    return [(row, losses, dense[row["commit"]]) for row, losses in judged if not _dense(row)]


def _dense(row: dict[str, Any]) -> bool:
    return row["setting"]["blocks"] == 0 and row["kv"] == "native"


def rises(losses: Losses, dense: Losses) -> dict[str, str]:
    """By corpus, and of all texts together."""
    each = {corpus: rise(*_judged(losses, dense, corpus)) for corpus in CORPORA}
    return each | {"mean": _mean(losses, dense)}


def _mean(losses: Losses, dense: Losses) -> str:
    """Geometric mean of the ratios of the corpora, each of the same weight."""
    means, errors = zip(*(paired(*_judged(losses, dense, corpus)) for corpus in CORPORA), strict=True)
    ratio = exp(fmean(means))
    return f"{ratio - 1:.1%} ± {ratio * sqrt(sum(error**2 for error in errors)) / len(errors):.1%}"


def _judged(losses: Losses, dense: Losses, corpus: str) -> tuple[list[float], list[float], list[int]]:
    """Both pairs' losses of each text, and which texts are of one document."""
    return losses[corpus]["nll"], dense[corpus]["nll"], losses[corpus]["documents"]


def _table(data: dict[str, Any] | None, split: str) -> str:
    if data is None or not (judged := pairs(data, split)):
        return "Not measured yet: `make bench-kvdistil`."
    lines = [(*_what(row), f"{row['saved']:.2f}x", *rises(losses, dense).values()) for row, losses, dense in judged]
    options = data["options"]
    text = (
        f"judged on {options[split]} x {options['continuation']} tokens of the "
        f"{split} split of each corpus after {options['prompt']} prompt tokens; rise of perplexity over dense, ± one "
        "paired standard error, texts of one document counted as one; all: geometric mean of the four; bytes against a "
        "bfloat16 pool"
    )
    head = ("K and V alone, of 30", "trained on", "steps x rate", "KV rows", "KV bytes saved", *CORPORA.values(), "all")
    return table(head, lines) + where(data["environment"], text, commits(row["commit"] for row, _, _ in judged))


def _what(row: dict[str, Any]) -> tuple[object, ...]:
    setting = row["setting"]
    if not setting["blocks"]:
        return "none", "", "", row["kv"]
    report = row["healing"].get("prefill")
    steps = f"{report['steps']} x {report['learning_rate']:g}" if report else "least squares alone"
    kept = "" if report is None or report["kept"] else ", not kept"
    text = f"{TEXTS[setting['text']]}, {setting['sequences']} x {setting.get('length', 256)} tokens"
    return setting["blocks"], text, steps + kept, row["kv"]
