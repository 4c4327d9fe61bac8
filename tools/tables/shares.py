"""Fixed rows beside a share of the prompt."""

from __future__ import annotations

from itertools import groupby
from math import exp
from typing import Any

from tables.base import difference, paired, table, where


def shares(data: dict[str, Any] | None) -> str:
    """At each prompt length: reduction and perplexity ratio of each plan, and the difference of two, paired."""
    if data is None:
        return "Not measured yet: `make bench-shares` writes it."
    lines = []
    for tokens, group in groupby(data["rows"], key=lambda row: row["prompt_tokens"]):
        loss = {row["plan"]: row for row in group}
        dense = loss.pop("dense")["loss"]
        cells = [f"{row['reduction']:.1f}x, {_ratio(row['loss'], dense)}" for row in loss.values()]
        lines.append((f"{tokens:,}", *cells, difference(loss["share"]["loss"], loss["fixed"]["loss"])))
    count, more = data["options"]["sequences"], data["options"]["continuation"] - 1
    return table(
        ("prompt tokens", "chosen at 512", "fixed, as many bytes in all", "share", "share less fixed, nats a token"),
        lines,
    ) + where(
        data["environment"],
        "in each cell bytes saved and perplexity ratio, both against dense",
        f"{count} continuations of {more} tokens after each length, of Brown's development split",
        "± is the standard error of the difference paired by sequence",
    )


def _ratio(loss: list[float], other: list[float]) -> str:
    mean, error = paired(loss, other)
    return f"{exp(mean):.3f} ± {exp(mean) * error:.3f}"
