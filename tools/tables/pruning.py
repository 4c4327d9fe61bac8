"""Blocks: searches, decode steps, the subset rule."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from tables.base import ratio, table, where


def pruning(data: dict[str, Any]) -> str:
    """Every method at every number of blocks; those with several seeds as mean and spread. Trained ones stand last."""
    groups = dict[tuple[int, bool, str], list[dict[str, Any]]]()
    for row in data["rows"]:
        groups.setdefault((row["removed"], row["trained"], row["method"]), []).append(row)
    rows = []
    for (removed, trained, method), found in sorted(groups.items(), key=lambda item: item[0][:2]):
        cells = [_spread([row[f"{corpus}_ppl"] for row in found]) for corpus in ("brown", "austen")]
        unified = [row["unified_ppl"] for row in found if row.get("unified_ppl")]
        cells += [_spread(unified) if unified else "", f"{fmean(row['choice'] for row in found):.0%}"]
        searched = [row for row in found if row.get("block_forwards")]
        cells.append(f"{fmean(row['block_forwards'] for row in searched):,.0f}" if searched else "")
        name = f"**{method}**" if method.startswith("ours") else method
        rows.append((removed or "", name + (", trained" if trained else ""), *cells))
    asked = data["options"]
    head = ("removed", "method", "Brown", "Austen", "Brown, one model", "choice", "block-forwards")
    return table(head, rows) + where(
        data["environment"],
        f"PD perplexity of {asked['sequences']} x {asked['continuation']} tokens after {asked['prompt']} of prompt, "
        f"prefill loses a third as many, chosen on {asked['calibration']} x {asked['length']} tokens of Brown's "
        f"calibration split; {asked['questions']} questions of Social IQa; ± is half the range of the seeds",
    )


def _spread(values: list[float]) -> str:
    """Mean, and half the range where there are several."""
    half = (max(values) - min(values)) / 2
    return f"{fmean(values):.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")


def steptime(data: dict[str, Any]) -> str:
    """How decode's step time follows the blocks removed."""
    keys = ("median", "low", "high")
    rows = [(r["batch"], r["removed"], *(ratio(r[name], *keys) for name in ("blocks", "step"))) for r in data["rows"]]
    head = ("sequences", "removed of 30", "blocks alone", "whole step, LM head included")
    said = f"median (5% - 95%) of {data['options']['rounds']} interleaved rounds; 1 is in proportion"
    return table(head, rows) + where(data["environment"], said)


def kvonly(data: dict[str, Any]) -> str:
    """Prefill blocks run for K and V alone, beside blocks dropped in both stages."""
    rows = [(r["blocks"] or "", r["what"], f"{r['brown_ppl']:.1f}", f"{r['austen_ppl']:.1f}") for r in data["rows"]]
    head = ("blocks", "prefill runs them for", "Brown", "Austen")
    asked = data["options"]
    said = f"PD perplexity of {asked['sequences']} x {asked['continuation']} tokens after {asked['prompt']} of prompt"
    return table(head, rows) + where(data["environment"], said, f"seed {asked['seed']}")
