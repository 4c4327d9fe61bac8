"""Blocks: which choice of blocks loses least, treated alike; decode's steps; the subset rule."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from tables.base import ratio, rise, table, where

NOTHING, REFIT, TRAINED = (
    "blocks removed, nothing else",
    "removed, then refitted",
    "removed, refitted or not, then trained",
)
NAMES = {
    "ours, greedy": (NOTHING, "**greedy**"),
    "SLEB": (NOTHING, "SLEB"),
    "SLEB, cached": (NOTHING, "SLEB, hidden states kept"),
    "ShortGPT": (NOTHING, "cosine (ShortGPT)"),
    "Shortened LLaMA": (NOTHING, "perplexity (Shortened LLaMA)"),
    "LLM-Streamline, no layer": (NOTHING, "window (LLM-Streamline without its layer)"),
    "random": (NOTHING, "random"),
    "ours, no compensation": (NOTHING, "**annealing + pairs**"),
    "ours, greedy, rescaled": (REFIT, "greedy + Prune&Comp's factors"),
    "LLM-Streamline, no layer, refitted": (REFIT, "window + refit"),
    "ShortGPT, refitted": (REFIT, "cosine + refit"),
    "ours, no annealing": (REFIT, "**greedy + refit**"),
    "ours, no annealing, baselines": (REFIT, "**greedy, window or cosine, by the judge, + refit**"),
    "ours, no D": (REFIT, "**annealing + refit**"),
    "ours": (REFIT, "**annealing + pairs + refit**"),
    "LLM-Streamline": (TRAINED, "window + one trained layer (LLM-Streamline)"),
    "LLM-Streamline, no layer, healed": (TRAINED, "window + refit + 30 steps"),
    "ShortGPT, healed": (TRAINED, "cosine + refit + 30 steps"),
    "ours, no annealing, healed": (TRAINED, "**greedy + refit + 30 steps**"),
    "ours, healed": (TRAINED, "**annealing + pairs + refit + 30 steps**"),
}
"""How a row was treated, and its name by what was done; bold where the product's own search chose."""


def pruning(data: dict[str, Any]) -> str:
    """Perplexity of each method by blocks removed, in three groups that were treated alike."""
    dense, options = _dense(data), data["options"]
    caption = where(
        data["environment"],
        f"PD perplexity of {options['sequences']} x {options['continuation']} tokens of Brown / Austen after "
        f"{options['prompt']} of prompt; dense {_both([dense])}; prefill loses a third as many blocks; chosen on "
        f"{options['calibration']} x {options['length']} tokens of Brown's calibration split",
        "a to b: least and most over three seeds of the search, which says nothing of the error of so little text",
    )
    head = ("treatment", "blocks chosen by", *(f"{n} of 30 removed" for n in _sizes(data)))
    return table(head, _by_size(data, _both)) + caption


def downstream(data: dict[str, Any]) -> str:
    """How much dearer Social IQa's right answers become, in the same groups."""
    dense, questions = _dense(data)["choice_loss"], data["options"]["questions"]

    def rise(rows: list[dict[str, Any]]) -> str:
        values = [row["choice_loss"] - dense for row in rows]
        return f"{fmean(values):+.2f}" if rows else ""

    caption = where(
        data["environment"],
        f"rise of the right answer's loss over dense ({dense:.2f}), nats a token of the answer, of {questions} "
        "questions; mean over seeds; no standard error was recorded",
    )
    head = ("treatment", "blocks chosen by", *(f"{n} of 30 removed" for n in _sizes(data)))
    return table(head, _by_size(data, rise)) + caption


def searchcost(data: dict[str, Any]) -> str:
    """Block-forwards of each search, its finalists included, and one model's perplexity."""
    groups = dict[tuple[int, str], list[dict[str, Any]]]()
    for row in data["rows"]:
        if row["removed"]:
            groups.setdefault((row["removed"], row["method"]), []).append(row)
    lines: list[tuple[object, ...]] = []
    for (removed, method), rows in sorted(groups.items(), key=lambda item: (item[0][0], _order(item[0][1]))):
        counts = [row["block_forwards"] for row in rows if row.get("block_forwards")]
        spread = _spread([row["unified_ppl"] for row in rows])
        lines.append((removed, _named(method)[1], f"{fmean(counts):,.0f}" if counts else "", spread))
    head = ("removed", "blocks chosen by", "block-forwards", "Brown, decode's stage as one model")
    return table(head, lines) + where(data["environment"], "mean over seeds; random needs none")


def _dense(data: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in data["rows"] if not row["removed"])


def _sizes(data: dict[str, Any]) -> list[int]:
    return sorted({row["removed"] for row in data["rows"] if row["removed"]})


def _by_size(data: dict[str, Any], cell: Any) -> list[tuple[str, ...]]:
    """A line for each method: its treatment, its name, a cell for each number of blocks."""
    lines, last = [], ""
    for method in sorted({row["method"] for row in data["rows"] if row["removed"]}, key=_order):
        rows = [row for row in data["rows"] if row["method"] == method]
        treatment, name = _named(method)
        cells = [cell([row for row in rows if row["removed"] == size]) for size in _sizes(data)]
        lines.append(("" if treatment == last else treatment, name, *(text or "not run" for text in cells)))
        last = treatment
    return lines


def _named(method: str) -> tuple[str, str]:
    return NAMES.get(method, (NOTHING, method))


def _order(method: str) -> tuple[int, int]:
    known = list(NAMES)
    treatments = (NOTHING, REFIT, TRAINED)
    return treatments.index(_named(method)[0]), known.index(method) if method in known else len(known)


def _both(rows: list[dict[str, Any]]) -> str:
    """`45.0 / 52.1`."""
    return " / ".join(_spread([row[f"{corpus}_ppl"] for row in rows]) for corpus in ("brown", "austen")) if rows else ""


def _spread(values: list[float]) -> str:
    """Least and most where they differ as shown."""
    least, most = _short(min(values)), _short(max(values))
    return least if least == most else f"{least} to {most}"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}" if value < 10_000 else "> 10,000"


def steptime(data: dict[str, Any]) -> str:
    """How decode's step time follows the blocks removed."""
    keys = ("median", "low", "high")
    rows = [(r["batch"], r["removed"], *(ratio(r[name], *keys) for name in ("blocks", "step"))) for r in data["rows"]]
    head = ("sequences", "removed of 30", "blocks alone", "whole step, LM head included")
    rounds = _rounds(data)
    return table(head, rows) + where(data["environment"], "computed in float32", rounds, "1 is in proportion")


def _rounds(data: dict[str, Any]) -> str:
    return f"median (5% - 95% of {data['options']['rounds']} interleaved rounds: not an interval of the median)"


def kvonly(data: dict[str, Any]) -> str:
    """Prefill blocks run for K and V alone, beside the same blocks dropped in both stages."""
    by_blocks = dict[int, dict[str, dict[str, Any]]]()
    for row in data["rows"]:
        by_blocks.setdefault(row["blocks"], {})[row["what"]] = row
    (dense,) = by_blocks.pop(0).values()
    names = list(next(iter(by_blocks.values())))
    rows = [(n, *(_both([by_name[name]]) for name in names)) for n, by_name in by_blocks.items()]
    options = data["options"]
    caption = (
        f"PD perplexity of {options['sequences']} x {options['continuation']} tokens of Brown / Austen after "
        f"{options['prompt']} of prompt, dense {_both([dense])}; {_paired(dense, by_blocks)}"
    )
    return table(("prefill blocks of 30", *names), rows) + where(
        data["environment"], caption, f"seed {options['seed']}"
    )


def _paired(dense: dict[str, Any], by_blocks: dict[int, dict[str, dict[str, Any]]]) -> str:
    """The rise that K and V alone cost, with its error, where the losses of each sequence were recorded."""
    if "brown_nll" not in dense:
        return "no standard error was recorded"
    rises = [
        f"{blocks} blocks {' / '.join(rise(row[f'{c}_nll'], dense[f'{c}_nll']) for c in ('brown', 'austen'))}"
        for blocks, rows in by_blocks.items()
        if (row := rows.get("K and V alone, refitted, gaps too"))
    ]
    return f"rise over dense and its paired standard error, refitted with gaps: {', '.join(rises)}"


def prefilltime(data: dict[str, Any]) -> str:
    """How prefill's time follows the blocks run for K and V alone."""
    keys = ("median", "low", "high")
    rows = [(r["alone"], *(ratio(r[name], *keys) for name in ("faster", "of_blocks"))) for r in data["rows"]]
    head = ("blocks of 30 for K and V alone", "prefill faster by", "of 30 / (30 - n)")
    options = data["options"]
    caption = f"engine onnxruntime, float32, {options['prompt']} tokens"
    rounds = _rounds(data)
    return table(head, rows) + where(data["environment"], caption, rounds)
