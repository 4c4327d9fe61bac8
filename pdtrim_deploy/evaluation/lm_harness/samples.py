"""The harness's samples as our values: a number for each question and metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.measured import Measured

_LIKELIHOODS = {"perplexity": "nll", "word_perplexity": "nll_word", "byte_perplexity": "nll_byte"}
"""Metrics that the harness turns into perplexities of all questions -> the NLL of a question, in nats a unit.

Of texts these are [sum of log-probabilities, units]; the harness weighs texts by their units (words, bytes).
"""


def measured(
    task: str, samples: list[dict[str, Any]], higher_is_better: Mapping[str, bool | None] | None = None
) -> Measured:
    """In the order of the questions. A metric of several filters is named `METRIC,FILTER`.

    Args:
        higher_is_better: by metric, as the harness has it; not used of perplexities, whose place a loss takes.

    Raises:
        UserError: no metric is a number for each question, as F1 and others that only all questions have.

    """
    filters = dict.fromkeys(sample["filter"] for sample in samples)
    values: dict[str, tuple[float, ...]] = {}
    higher: dict[str, bool] = {}
    weights: dict[str, tuple[float, ...]] = {}
    for name in filters:
        rows = sorted((sample for sample in samples if sample["filter"] == name), key=lambda sample: sample["doc_id"])
        for metric in rows[0]["metrics"]:
            column = [_value(metric, row[metric]) for row in rows]
            label = _LIKELIHOODS.get(metric, metric) + (f",{name}" if len(filters) > 1 else "")
            if (numbers := [number for number in column if number is not None]) and len(numbers) == len(rows):
                values[label] = tuple(numbers)
                if metric in _LIKELIHOODS and all(isinstance(row[metric], list) for row in rows):
                    weights[label] = tuple(float(row[metric][1]) for row in rows)
                if metric not in _LIKELIHOODS and (direction := (higher_is_better or {}).get(metric)) is not None:
                    higher[label] = direction
    if not values:
        raise UserError(f"task {task} has no metric that is a number for each question; leave it out")
    return Measured(task, ("all",) * len(next(iter(values.values()))), values, higher_is_better=higher, weights=weights)


def joined(name: str, by_task: dict[str, Measured]) -> Measured:
    """All questions of a group's tasks, each counted once and under its task; of a single task, its own.

    Raises:
        UserError: the tasks have no measure in common.

    """
    results = list(by_task.values())
    if len(results) == 1:
        return replace(results[0], task=name)
    measures = [m for m in results[0].values if all(m in result.values for result in results)]
    if not measures:
        raise UserError(f"{name}: its tasks have no measure in common; name them one by one: {', '.join(by_task)}")
    groups = tuple(task for task, result in by_task.items() for _ in result.groups)
    values = {m: tuple(v for result in results for v in result.values[m]) for m in measures}
    directions = {m: {result.higher_is_better.get(m) for result in results} for m in measures}
    higher = {
        m: direction
        for m, states in directions.items()
        if len(states) == 1 and (direction := next(iter(states))) is not None
    }
    common = [m for m in measures if all(m in result.weights for result in results)]
    weights = {m: tuple(w for result in results for w in result.weights[m]) for m in common}
    return Measured(name, groups, values, higher_is_better=higher, weights=weights)


def _value(metric: str, value: Any) -> float | None:
    if metric in _LIKELIHOODS:
        total, units = value if isinstance(value, list) else (value, 1)
        return -float(total) / float(units) if units else 0.0  # an empty text has no bytes, and weighs nothing
    return float(value) if isinstance(value, int | float) else None
