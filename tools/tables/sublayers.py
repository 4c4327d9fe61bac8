"""Attentions, MLPs and whole blocks that decode goes without."""

from __future__ import annotations

from typing import Any

from tables.base import commits, difference, rise, table, where

CORPORA = {"brown": "Brown", "code": "code"}
STRIDE = 1000  # of pruning/units.py: block 5 is unit 5, its attention 1005, its MLP 2005
QUARTERS = {"attention": 1, "mlp": 3, "block": 4}
"""Weights of a sublayer in quarters of a block's: SmolLM2-135M's attention has 0.88 million, its MLP 2.65."""


def sublayers(data: dict[str, Any] | None) -> str:
    """What each choice loses, and how much more than whole blocks of the same weights, paired by sequence."""
    if data is None:
        return "Not measured yet: `make bench-sublayers`."
    lines = []
    for row in data["rows"]:
        blocks = next((other for other in data["rows"] if _equal(row, other)), None)
        against = [difference(row[name], blocks[name]) if blocks else "" for name in CORPORA]
        rises = [rise(row[name], row[f"{name}_dense"]) for name in CORPORA]
        units = ", ".join(str(int(unit) % STRIDE) for unit in row["units"].split(", "))
        kind = {"mlp": "MLP"}.get(row["kind"], row["kind"]) + "s" * (row["removed"] > 1)
        lines.append((f"{row['removed']} {kind}: {units}", f"{_quarters(row) / 4:g}", *rises, *against))
    options = data["options"]
    text = (
        f"chosen on {options['calibration']} x {options['length']} tokens of Brown's calibration split, judged on "
        f"{options['sequences']} x {options['length'] - options['prompt']} tokens of each development split after "
        f"dense KV of {options['prompt']} of prompt; no refit; rise of perplexity over dense, ± one paired standard "
        "error, and nats a token minus those of whole blocks with the same weights"
    )
    head = ("decode runs without", "weights, in blocks", *CORPORA.values(), "Brown, minus blocks", "code, minus blocks")
    return table(head, lines) + where(data["environment"], text, commits(row["commit"] for row in data["rows"]))


def _quarters(row: dict[str, Any]) -> int:
    return QUARTERS[row["kind"]] * int(row["removed"])


def _equal(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether `other` lost whole blocks of the weights that `row` lost in sublayers, by the same draw of the text."""
    same = (_quarters(row), row["seed"]) == (_quarters(other), other["seed"])
    return same and other["kind"] == "block" and row["kind"] != "block"
