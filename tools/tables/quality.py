"""Plans that cut KV alone, beside dense: perplexity by domain, tasks."""

from __future__ import annotations

from typing import Any

from tables.base import precision, table, where

_PARTS = {
    "prose": "perplexity, prose (Brown)",
    "dialogue": "perplexity, agents' conversations",
    "code": "perplexity, code",
    "hellaswag": "HellaSwag, acc_norm",
    "gsm8k": "GSM8K, 5 shots",
}


def quality(data: dict[str, Any] | None) -> str:
    """A line for each model, part and plan; a recovery within two standard errors of 1 is called a tie."""
    if data is None:
        return "Not measured yet: `make bench-quality`."
    lines = []
    for row in data["rows"]:
        form = "{:.2f}" if row["measure"] == "nll" else "{:.1%}"
        scores = (form.format(row["dense"]), form.format(row["score"]))
        name = f"{row['model']} ({precision(row['model'])})"
        source = f"{row['commit']}, {row['machine']}"
        reduction = f"{row['reduction']:.2f}x"
        lines.append((name, _PARTS[row["part"]], row["plan"], reduction, row["n"], *scores, _recovery(row), source))
    options = data["options"]
    text = (
        f"on the PD oracle in float32; bytes, against a bfloat16 pool, at {options['prompt']} prompt tokens; "
        f"perplexity of {options['continuation']} tokens after {options['prompt']}-token prompts; recovery is the "
        "plan's score over dense's, of perplexity the ratio, ± its paired standard error"
    )
    head = ("model", "measured on", "plan", "KV bytes saved", "n", "dense", "plan's", "recovery", "commit, machine")
    return table(head, lines) + where(data["environment"], text, model="")


def _recovery(row: dict[str, Any]) -> str:
    if row["recovery"] is None:
        return "none: dense scores 0"
    if row["se"] is None:
        return f"{row['recovery']:.3f}"
    tie = abs(row["recovery"] - 1) <= 2 * row["se"] or row["recovery"] == 1
    digits = 4 if row["measure"] == "nll" else 3  # a wire costs tenths of a percent of perplexity
    return f"{row['recovery']:.{digits}f} ± {row['se']:.{digits}f}" + " (tie)" * tie
