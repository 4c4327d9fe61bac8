"""KV-only blocks, and a tail of each prompt that runs the unchanged model: losses, needles, prefill's work."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp, sqrt
from statistics import fmean
from typing import Any

from tables.base import commits, paired, precision, ratio, rise, table, where

DENSE = "dense"
CORPORA = {"brown": "Brown", "austen": "Austen", "code": "code", "agents": "agents"}
Rows = dict[Any, dict[str, Any]]
"""By corpus, or `needle`."""


def tail(data: dict[str, Any] | None) -> str:
    """By model, prompt length, prefill and tail; plans that were not judged on everything are left out."""
    if data is None:
        return "Not measured yet: `make bench-tail` writes it."
    lines = [_line(*key, rows, dense) for *key, rows, dense in judged(data)]
    about = ("model", "KV-only blocks", "prompt tokens", "tail", "prefill's work")
    head = (*about, *CORPORA.values(), "all", "needles, dense")
    options = data["options"]
    text = (
        f"{options['texts']} continuations of {options['continuation']} tokens of each corpus' final split after "
        f"prompts of up to 512 tokens, {options['long']} after longer ones; rise of perplexity over dense, ± one "
        "paired standard error, texts of one document counted as one; all: geometric mean of the four; prefill's "
        "work: of the blocks' of the unpruned model, by arithmetic; needles: facts inside a prompt that were found"
    )
    used = commits(row["commit"] for row in data["rows"])
    return table(head, lines) + where(data["environment"], text, used, model="")


def ttft(data: dict[str, Any] | None) -> str:
    """TTFT of served pairs over dense's, beside the work of prefill's blocks."""
    if data is None:
        return "Not measured yet: `make bench-ttft` writes it."
    options = data["options"]
    rows = [
        (
            f"{row['model']} ({precision(row['model'])})",
            f"{row['prompt']:,}",
            f"the last {row['blocks']} blocks KV-only, tail of {row['tail']}",
            f"{row['predicted']:.2f}",
            ratio(row, "ratio", "low", "high"),
            row["starts"],
            f"{row['dense_ms']:.0f}",
            row["load_average"],
        )
        for row in data["rows"]
    ]
    head = (
        "model",
        "prompt tokens",
        "prefill",
        "prefill's work",
        "TTFT over dense (95% interval)",
        "starts",
        "dense, ms",
        "load average",
    )
    text = (
        f"float32, one request at a time, {options['rounds']} interleaved rounds of {options['requests']} requests a "
        "pair in each start of the servers, the pairs of a start up at once; prefill's work: of the blocks' of the "
        "unpruned model, by arithmetic"
    )
    used = commits(name for row in data["rows"] for name in row["commit"].split(" + "))
    return table(head, rows) + where(data["environment"], text, used, model="")


def judged(data: dict[str, Any]) -> Iterator[tuple[str, int, str, int, Rows, Rows]]:
    """Model, prompt tokens, prefill, tail, its rows and dense's, of everything that was judged whole."""
    grouped: dict[tuple[str, int, str, int], Rows] = {}
    for row in data["rows"]:
        grouped.setdefault((row["model"], row["prompt"], row["prefill"], row["tail"]), {})[row["corpus"]] = row
    whole = {key: rows for key, rows in grouped.items() if {*CORPORA, "needle"} <= rows.keys()}
    for (model, prompt, prefill, tokens), rows in sorted(whole.items()):
        if prefill != DENSE and (dense := whole.get((model, prompt, DENSE, 0))):
            yield model, prompt, prefill, tokens, rows, dense


def of_all(rows: Rows, dense: Rows) -> str:
    """Geometric mean of the ratios of the corpora, each of the same weight: `4.2% ± 0.8%`."""
    means, errors = zip(*(paired(*_losses(rows, dense, corpus)) for corpus in CORPORA), strict=True)
    ratio = exp(fmean(means))
    return f"{ratio - 1:.1%} ± {ratio * sqrt(sum(error**2 for error in errors)) / len(errors):.1%}"


def _losses(rows: Rows, dense: Rows, corpus: str) -> tuple[list[float], list[float], list[int]]:
    """Both plans' losses of each text, and which texts are of one document."""
    return rows[corpus]["nll"], dense[corpus]["nll"], rows[corpus]["documents"]


def _line(model: str, prompt: int, prefill: str, tokens: int, rows: Rows, dense: Rows) -> tuple[object, ...]:
    losses = [rise(*_losses(rows, dense, corpus)) for corpus in CORPORA]
    right, of_dense = (sum(part["needle"]["right"]) for part in (rows, dense))
    needles = f"{right} of {len(rows['needle']['right'])}, {of_dense}"
    work = f"{rows['brown']['share']:.2f}"
    about = (f"{model} ({precision(model)})", prefill, f"{prompt:,}", tokens, work)
    return *about, *losses, of_all(rows, dense), needles
