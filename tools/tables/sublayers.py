"""Attentions, MLPs and whole blocks that decode goes without, by the loss that they cost."""

from __future__ import annotations

from itertools import groupby
from math import exp, sqrt
from statistics import fmean, stdev
from typing import Any

from tables.base import table, where

_NAMES = {"attention": "attentions", "mlp": "MLPs", "block": "whole blocks"}
_WEIGHTS = {"attention": 0.25, "mlp": 0.75, "block": 1.0}  # of a block's, in SmolLM2-135M
_BLOCKS = 30


def sublayers(data: dict[str, Any]) -> str:
    """For each kind and number: what goes with them, and the loss ratios, over draws of the calibration text."""
    order = [*_NAMES]
    rows = sorted(data["rows"], key=lambda row: (order.index(row["kind"]), row["removed"], row["seed"]))
    lines = []
    for (kind, removed), group in groupby(rows, key=lambda row: (row["kind"], row["removed"])):
        draws = list(group)
        share = removed * _WEIGHTS[kind] / _BLOCKS
        kv = 0 if kind == "mlp" else removed / _BLOCKS
        chosen = "; ".join(", ".join(str(int(unit) % 1000) for unit in row["units"].split(", ")) for row in draws)
        cells = [_ratio(draws, corpus) for corpus in ("brown", "code")]
        forwards = fmean(row["block_forwards"] for row in draws)
        lines.append((f"{removed} {_NAMES[kind]}", chosen, f"{kv:.0%}", f"{share:.0%}", *cells, f"{forwards:,.0f}"))
    options = data["options"]
    text = (
        f"chosen by greedy on {options['calibration']} x {options['length']} tokens of Brown's calibration split, one "
        f"column entry a draw; judged on {options['sequences']} x {options['length']} of each development split behind "
        f"{options['prompt']} of the dense model's prompt KV; perplexity over the dense one, with the standard error "
        "of differences paired by sequence (mean over draws); no refit"
    )
    head = (
        "decode without",
        "of blocks, each draw",
        "prompt KV",
        "weights of blocks",
        "Brown",
        "code",
        "block-forwards",
    )
    return table(head, lines) + where(data["environment"], text)


def _ratio(draws: list[dict[str, Any]], corpus: str) -> str:
    pairs = [zip(row[corpus], row[f"{corpus}_dense"], strict=True) for row in draws]
    rises = [fmean(lost - dense for lost, dense in sequence) for sequence in zip(*pairs, strict=True)]
    mean, error = fmean(rises), stdev(rises) / sqrt(len(rises))
    return f"{exp(mean):.3f} ± {exp(mean) * error:.3f}"
