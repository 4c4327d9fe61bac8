"""Blocks chosen by KL to the dense model beside those chosen by loss."""

from __future__ import annotations

from itertools import groupby
from statistics import fmean
from typing import Any

from tables.base import difference, precision, table, where

_MEASURES = ("brown_loss", "brown_kl", "code_loss", "code_kl")


def objective(data: dict[str, Any]) -> str:
    """For each model and number of blocks: KL's choice less loss's, paired by sequence, over draws of the text."""
    keys = ("model", "removed")
    rows = sorted(data["rows"], key=lambda row: (row["model"] != "SmolLM2-135M", row["removed"]))
    lines = []
    for (model, removed), group in groupby(rows, key=lambda row: tuple(row[key] for key in keys)):
        pairs = _pairs(list(group))
        forwards = [fmean(pair[name]["block_forwards"] for pair in pairs) for name in ("loss", "kl")]
        cells = [_difference(pairs, measure) for measure in _MEASURES]
        chosen = "; ".join(f"{pair['loss']['blocks']} / {pair['kl']['blocks']}" for pair in pairs)
        lines.append(
            (f"{model} ({precision(model)})", removed, chosen, *cells, f"{forwards[0]:,.0f} / {forwards[1]:,.0f}")
        )
    options = data["options"]
    head = (
        "model",
        "removed",
        "blocks by loss / by KL, each draw",
        "loss, Brown",
        "KL, Brown",
        "loss, code",
        "KL, code",
    )
    text = (
        f"chosen on {options['calibration']} x {options['length']} tokens of Brown's calibration split, judged on "
        f"{options['sequences']} x {options['judged_length']} of each development split after "
        f"{options['judged_prompt']} of prompt: nats a token, the choice by KL minus that by loss, "
        "below 0 where KL is better, "
        "and the standard error of the difference paired by sequence (the mean over draws of each); no refit"
    )
    return table((*head, "block-forwards"), lines) + where(data["environment"], text, model="")


def _pairs(rows: list[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """By draw, where both objectives were searched."""
    by_seed: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], {})[row["objective"]] = row
    return [by_seed[seed] for seed in sorted(by_seed) if len(by_seed[seed]) == 2]


def _difference(pairs: list[dict[str, dict[str, Any]]], measure: str) -> str:
    kl, loss = (
        [fmean(draws) for draws in zip(*(pair[name][measure] for pair in pairs), strict=True)]
        for name in ("kl", "loss")
    )
    return "same" if kl == loss else difference(kl, loss)
