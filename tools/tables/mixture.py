"""Plans calibrated on the default mixture beside the same on prose alone."""

from __future__ import annotations

from typing import Any

from tables.base import quotient, rise, table, where

_KINDS = {
    "brown": "prose",
    "code": "code",
    "questions": "questions",
    "recall": "recall",
    "agents": "agents' conversations (in neither)",
}
_DENSE = "dense"


def mixture(data: dict[str, Any] | None) -> str:
    """For each plan and kind of text: the rise of perplexity by both, and their difference, paired by sequence."""
    if data is None:
        return "No figures of it are committed yet."
    rows, options = {(row["plan"], row["text"]): row for row in data["rows"]}, data["options"]
    dense, lines = rows[_DENSE, "brown"], []
    for plan in dict.fromkeys(plan for plan, _ in rows if plan != _DENSE):
        sides = [rows.get((plan, text)) for text in ("brown", "mixture")]
        if None in sides:
            continue
        for corpus, kind in _KINDS.items():
            losses = [side[corpus] for side in sides]
            rises = [rise(side, dense[corpus]) for side in losses]
            lines.append((plan, kind, *rises, quotient(losses[1], losses[0])))
        lost = [
            f"{stage} loses {' / '.join(', '.join(map(str, side[stage])) for side in sides)}"
            for stage in ("prefill", "decode")
            if any(side[stage] for side in sides)
        ]
        if lost:
            lines[-len(_KINDS)] = (f"{plan}: {', '.join(lost)}", *lines[-len(_KINDS)][1:])
    budgets = any(plan.startswith("budget") for plan, _ in rows)
    kv = f", KV chosen on {options['kv_sequences']} sequences" if budgets else ""
    text = (
        f"blocks chosen on {options['calibration']} x 256 tokens and refitted on {options['fitted']} x 256"
        f"{kv}; rise of perplexity over the unpruned model on {options['sequences']} "
        f"x {options['continuation']} tokens of each development split after {options['prompt']} prompt tokens; the "
        "last column is the perplexity by the mixture over that by prose, below 1 where the mixture is better; errors "
        "are paired by sequence"
    )
    head = ("plan", "judged on", "calibrated on prose", "calibrated on the mixture", "ratio")
    return table(head, lines) + where(data["environment"], text)
