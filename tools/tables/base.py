"""Functions that all tables use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, sqrt
from statistics import fmean
from typing import Any

SMOLLM2 = "SmolLM2-135M-Instruct"
WEIGHTS = {SMOLLM2: "Q4_1", "Qwen2.5-Coder-0.5B-Instruct": "Q4_K_M"}
"""The file's precision that each model's weights were dequantised from."""


def precision(model: str) -> str:
    """The file's precision that the weights of a model of that name, or of its beginning, were dequantised from."""
    return next((kind for name, kind in WEIGHTS.items() if name.startswith(model)), "precision unknown")


def weights(model: str = SMOLLM2) -> str:
    """Model and precision of its weights, as every table says it."""
    return f"{model}, weights dequantised from a {precision(model)} file"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def rise(losses: Sequence[float], dense: Sequence[float], documents: Sequence[int] = ()) -> str:
    """Rise of perplexity, and its standard error, from losses of the same sequences, nats a token: `4.2% ± 0.8%`."""
    mean, error = paired(losses, dense, documents)
    return f"{exp(mean) - 1:.1%} ± {exp(mean) * error:.1%}"


def difference(losses: Sequence[float], others: Sequence[float]) -> str:
    """Mean difference of losses of the same sequences, nats a token, and its standard error: `-0.010 ± 0.007 (tie)`."""
    mean, error = paired(losses, others)
    return f"{mean:+.3f} ± {error:.3f}{tie(mean, error)}"


def quotient(losses: Sequence[float], others: Sequence[float]) -> str:
    """Ratio of perplexities of the same sequences, from losses, and its standard error: `0.981 ± 0.012 (tie)`."""
    mean, error = paired(losses, others)
    return f"{exp(mean):.3f} ± {exp(mean) * error:.3f}{tie(mean, error)}"


def tie(mean: float, error: float) -> str:
    """What stands behind a difference within two standard errors."""
    return " (tie)" if abs(mean) <= 2 * error else ""


def paired(losses: Sequence[float], others: Sequence[float], documents: Sequence[int] = ()) -> tuple[float, float]:
    """Mean difference of losses of the same sequences, and its standard error.

    Sequences with the same number in `documents` are of one document, which counts as a whole; without, each by itself.
    """
    differences = [loss - other for loss, other in zip(losses, others, strict=True)]
    mean, strayed = fmean(differences), dict[int, float]()
    for document, difference in zip(documents or range(len(differences)), differences, strict=True):
        strayed[document] = strayed.get(document, 0.0) + difference - mean
    squares = sum(total**2 for total in strayed.values())
    return mean, sqrt(squares * len(strayed) / (len(strayed) - 1)) / len(differences)


def where(environment: dict[str, Any], *more: str, model: str = SMOLLM2) -> str:
    """The line below a table: command, machine, versions, model, and further settings."""
    machine, versions = environment["machine"], environment["versions"]
    parts = [f"{machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}, no GPU"]
    parts += [weights(model)] if model else []
    return f"\n\n`{environment['command']}` on {'; '.join([*parts, *more])}."


def commits(names: Iterable[str]) -> str:
    """Of the sources that made the rows, each once: `commits 1a2b3c4d, 5e6f7a8b`."""
    unique = dict.fromkeys(names)
    return f"commit{'s' * (len(unique) > 1)} {', '.join(unique)}"


def ratio(figure: dict[str, float], middle: str = "median", low: str = "least", high: str = "most") -> str:
    """`0.83 (0.73-0.95)`."""
    return f"{figure[middle]:.2f} ({figure[low]:.2f}-{figure[high]:.2f})"


def interval(ratios: Iterable[dict[str, Any]], name: str) -> str:
    """The figure of that name in a list of ratios: `0.83 (0.73-0.95)`; empty where it was not measured."""
    figures = [row for row in ratios if row["figure"] == name]
    return ratio(figures[0], "ratio", "low", "high") if figures else ""
