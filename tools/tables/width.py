"""Narrower MLPs of decode beside fewer blocks."""

from __future__ import annotations

from typing import Any

from tables.base import commits, difference, rise, table, where

CORPORA = ("brown", "code")


def width(data: dict[str, Any] | None) -> str:
    """What each loses, and how much more than the blocks of about equal weights, paired by sequence."""
    if data is None:
        return "Not measured yet: `make bench-width`."
    rows = data["rows"]
    dense = next(row for row in rows if row["case"] == "dense")
    lines = []
    for row in (row for row in rows if row["case"] != "dense"):
        blocks = next((other for other in rows if row.get("width") and _pairs(row, other)), None)
        against = [difference(row[corpus], blocks[corpus]) if blocks else "" for corpus in CORPORA]
        share = f"{row['parameters'] / dense['parameters']:.3f}"
        lines.append((row["text"], row["case"], share, *(rise(row[c], dense[c]) for c in CORPORA), *against))
    options = data["options"]
    judged = options["length"] - options["prompt"]
    text = (
        f"channels and refit of {options['calibration']} x {options['length']} tokens of the text, blocks searched on "
        f"{options['searched']} of these, prompt tokens count {options['share']:g} in the blocks' refit; trained: "
        f"{options['steps']} steps of 4 x {options['read']} tokens at {options['rate']:g}; judged on "
        f"{options['sequences']} x {judged} tokens of each development split after dense KV of {options['prompt']} of "
        "prompt: rise of perplexity over dense, ± one paired standard error, "
        "and nats a token minus those of 6 blocks of the same text and treatment; width: channels left of 1,536 in the "
        "MLP of every block; weights: decode's of dense, embeddings included"
    )
    head = ("text", "decode", "weights", "Brown", "code", "Brown, minus 6 blocks", "code, minus 6 blocks")
    return table(head, lines) + where(data["environment"], text, commits(row["commit"] for row in rows))


def _pairs(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether `other` lost six blocks, of the same text and treatment, and has the weights of `row` within 1.5 %."""
    alike = all(row.get(name) == other.get(name) for name in ("text", "treatment"))
    near = abs(row["parameters"] / other["parameters"] - 1) < 0.015
    return alike and near and other.get("blocks") == 6 and not other.get("width")
