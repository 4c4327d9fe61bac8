"""Greedy with racing beside greedy that measures everything."""

from __future__ import annotations

from math import exp
from statistics import fmean
from typing import Any

from tables.base import precision, quotient, table, where


def racing(data: dict[str, Any] | None) -> str:
    """For each model and draw of the text: what both searches chose, what that cost, and what it loses."""
    if data is None:
        return "No figures of it are committed yet."
    lines = []
    for model, seed in dict.fromkeys((row["model"], row["seed"]) for row in data["rows"]):
        sides = {row["racing"]: row for row in data["rows"] if (row["model"], row["seed"]) == (model, seed)}
        if len(sides) == 2:
            lines.append((f"{model} ({precision(model)})", seed, *_cells(sides[True], sides[False])))
    options = data["options"]
    text = (
        f"chosen on {options['calibration']} x {options['length']} tokens of Brown's calibration split, drawn by the "
        "seed; objective: exact losses there, nats a token, of prefill and of decode after that prefill; perplexity of "
        f"{options['sequences']} x {options['length'] // 2} tokens of the development split after as much prompt, the "
        "ratio's error paired by sequence; no refit; a / b: with racing / without"
    )
    head = ("model", "seed", "prefill loses", "decode loses", "block-forwards", "objective", "perplexity", "ratio")
    return table(head, lines) + where(data["environment"], text, model="")


def _cells(raced: dict[str, Any], full: dict[str, Any]) -> list[str]:
    chosen = [_both(raced[stage], full[stage]) for stage in ("prefill", "decode")]
    forwards = f"{raced['block_forwards']:,} / {full['block_forwards']:,}"
    objective = [_both(f"{raced[name]:.4f}", f"{full[name]:.4f}") for name in ("prefill_objective", "decode_objective")]
    losses = [row["development"] for row in (raced, full)]
    ratio = "same blocks" if losses[0] == losses[1] else quotient(*losses)
    return [*chosen, forwards, "; ".join(objective), _both(*(f"{exp(fmean(side)):.1f}" for side in losses)), ratio]


def _both(first: str, second: str) -> str:
    return first if first == second else f"{first} / {second}"
