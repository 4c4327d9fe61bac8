"""Blocks: searches, decode steps, the subset rule."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from tables.base import ratio, table, where


def pruning(data: dict[str, Any]) -> str:
    """Perplexity of each method by blocks removed, and all other figures folded away. Trained ones stand last."""
    rows = [row for row in data["rows"] if row["removed"]]
    dense = next(row for row in data["rows"] if not row["removed"])
    methods = dict.fromkeys((row["trained"], row["method"]) for row in rows)
    removed = sorted({row["removed"] for row in rows})
    lines = []
    for trained, method in sorted(methods, key=lambda item: item[0]):
        found = [[r for r in rows if (r["method"], r["removed"]) == (method, n)] for n in removed]
        lines.append((_named(method, trained), *(_both(group) for group in found)))
    asked = data["options"]
    said = where(
        data["environment"],
        f"PD perplexity of {asked['sequences']} x {asked['continuation']} tokens of Brown / Austen after "
        f"{asked['prompt']} of prompt; dense {_both([dense])}; prefill loses a third as many, chosen on "
        f"{asked['calibration']} x {asked['length']} tokens of Brown's calibration split; ± is half the range of seeds "
        f"0, 1, 2, where a method has them; what only says where a gain comes from is asked at 4 and 6",
    )
    head = ("method", *(f"{n} of 30 removed" for n in removed))
    return table(head, lines) + said + "\n\n" + _details(rows, dense, asked["questions"])


def _details(rows: list[dict[str, Any]], dense: dict[str, Any], questions: int) -> str:
    groups = dict[tuple[int, bool, str], list[dict[str, Any]]]()
    for row in rows:
        groups.setdefault((row["removed"], row["trained"], row["method"]), []).append(row)
    lines: list[tuple[object, ...]] = [
        ("", "dense", "", f"{dense['choice']:.0%}", f"{dense['choice_loss']:.2f}", "", "")
    ]
    for (removed, trained, method), found in sorted(groups.items(), key=lambda item: item[0][:2]):
        means = {
            name: fmean(values) if (values := [row[name] for row in found if row.get(name)]) else None
            for name in ("choice", "choice_loss", "seconds", "fit_seconds", "block_forwards")
        }
        lines.append(
            (
                removed,
                _named(method, trained),
                _spread([row["unified_ppl"] for row in found]),
                f"{means['choice']:.0%}",
                f"{means['choice_loss']:.2f}",
                "" if means["seconds"] is None else f"{means['seconds']:,.0f} + {means['fit_seconds'] or 0:,.0f}",
                "" if means["block_forwards"] is None else f"{means['block_forwards']:,.0f}",
            )
        )
    head = ("removed", "method", "Brown, one model", "choice", "right answer's loss", "seconds", "block-forwards")
    return (
        "<details><summary>One model for both stages, choices, seconds and block-forwards of each</summary>\n\n"
        + table(head, lines)
        + f"\n\n{questions} questions of Social IQa. One model is decode's stage reading the prompt too; refitted, it "
        "was fitted to tokens behind prompts alone. Seconds of the search, and of fitting and training what is left "
        "(one plan, treated one way, is fitted and judged once, for all rows that have it; a student that another "
        "search has made takes no time); one core, others at work beside it. Block-forwards of the search and of "
        "judging its finalists.\n\n</details>"
    )


def _named(method: str, trained: bool) -> str:
    return (f"**{method}**" if method.startswith("ours") else method) + (", trained" if trained else "")


def _both(rows: list[dict[str, Any]]) -> str:
    """`45.0 / 52.1`."""
    return " / ".join(_spread([row[f"{corpus}_ppl"] for row in rows]) for corpus in ("brown", "austen")) if rows else ""


def _spread(values: list[float]) -> str:
    """Mean, and half the range where there are several; least and most where those are far apart."""
    least, most = min(values), max(values)
    if most > 2 * least:
        return f"{_short(least)} to {_short(most)}"
    return _short(fmean(values)) + (f" ± {(most - least) / 2:.1f}" if len(values) > 1 else "")


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}" if value < 10_000 else "> 10,000"


def steptime(data: dict[str, Any]) -> str:
    """How decode's step time follows the blocks removed."""
    keys = ("median", "low", "high")
    rows = [(r["batch"], r["removed"], *(ratio(r[name], *keys) for name in ("blocks", "step"))) for r in data["rows"]]
    head = ("sequences", "removed of 30", "blocks alone", "whole step, LM head included")
    said = f"median (5% - 95%) of {data['options']['rounds']} interleaved rounds; 1 is in proportion"
    return table(head, rows) + where(data["environment"], said)


def kvonly(data: dict[str, Any]) -> str:
    """Prefill blocks run for K and V alone, beside the same blocks dropped in both stages."""
    found = dict[int, dict[str, dict[str, Any]]]()
    for row in data["rows"]:
        found.setdefault(row["blocks"], {})[row["what"]] = row
    (dense,) = found.pop(0).values()
    names = list(next(iter(found.values())))
    rows = [(n, *(_both([by_name[name]]) for name in names)) for n, by_name in found.items()]
    asked = data["options"]
    said = (
        f"PD perplexity of {asked['sequences']} x {asked['continuation']} tokens of Brown / Austen after "
        f"{asked['prompt']} of prompt, dense {_both([dense])}"
    )
    return table(("prefill blocks of 30", *names), rows) + where(data["environment"], said, f"seed {asked['seed']}")


def prefilltime(data: dict[str, Any]) -> str:
    """How prefill's time follows the blocks run for K and V alone."""
    keys = ("median", "low", "high")
    rows = [(r["alone"], *(ratio(r[name], *keys) for name in ("faster", "of_blocks"))) for r in data["rows"]]
    head = ("blocks of 30 for K and V alone", "prefill faster by", "of 30 / (30 - n)")
    asked = data["options"]
    said = f"engine onnxruntime, {asked['prompt']} tokens; median (5% - 95%) of {asked['rounds']} interleaved rounds"
    return table(head, rows) + where(data["environment"], said)
