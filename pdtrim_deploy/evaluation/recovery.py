"""Recovery: a bundle's score over the dense model's on the same questions, its error, and the recipe's gate.

Of a mean loss in nats it is the ratio of perplexities, where less is better; of any other measure the ratio of means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.evaluation.tasks.base import Measured

_LEADING = ("nll", "acc_norm", "acc", "accuracy", "exact", "prefix", "right", "exact_match")
"""The measure that stands for a task, the first of these that it has (`exact_match,FILTER` too); else its first."""


class Recovery(BaseModel):
    """`recovery` is None where the dense model scores 0; `stderr` None for a single question.

    `gate` is the recipe's, `passed` whether it is kept; both None where the recipe names no such task.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    measure: str
    items: int
    dense: float
    score: float
    recovery: float | None
    stderr: float | None
    gate: float | None = None
    passed: bool | None = None

    @classmethod
    def of(cls, dense: Measured, pd: Measured, gates: Mapping[str, float]) -> Recovery:
        """Of the task's leading measure."""
        measure = leading(dense)
        loss = measure.startswith("nll")
        before, after = dense.mean(measure), pd.mean(measure)
        if loss:
            paired = pd.against(dense, measure)
            recovery: float | None = math.exp(paired.mean)
            stderr = math.exp(paired.mean) * paired.stderr
            before, after = math.exp(before), math.exp(after)
        else:
            recovery = after / before if before else None
            stderr = _error_of_ratio(dense, pd, measure) if before else math.nan
        gate = gates.get(dense.task)
        passed = None if gate is None else recovery is not None and (recovery <= gate if loss else recovery >= gate)
        return cls(
            task=dense.task,
            measure=measure,
            items=len(dense.groups),
            dense=before,
            score=after,
            recovery=recovery,
            stderr=None if math.isnan(stderr) else stderr,
            gate=gate,
            passed=passed,
        )

    def sentence(self) -> str:
        """One line for the screen."""
        if self.recovery is None:
            text = f"{self.task}: no recovery of {self.measure}, the dense model scores 0"
        else:
            spread = "" if self.stderr is None else f" +- {self.stderr:.4f}"
            scores = f"{self.score:.4f} of {self.dense:.4f} dense"
            text = f"{self.task}: {self.measure} {scores}, recovery {self.recovery:.4f}{spread}"
        return text + ("" if self.gate is None else f", {verdict(self)}")


def verdict(row: Recovery) -> str:
    """The gate, and whether it is kept."""
    bound = "at most" if row.measure.startswith("nll") else "at least"
    return f"gate {bound} {row.gate:g}: {'passed' if row.passed else 'FAILED'}"


def leading(result: Measured) -> str:
    """The measure that stands for a task."""
    for name in _LEADING:
        for measure in result.values:
            if measure == name or measure.startswith(f"{name},"):
                return measure
    return next(iter(result.values))


def _error_of_ratio(dense: Measured, pd: Measured, measure: str) -> float:
    """To first order: the error of the mean of what each question moves the ratio by."""
    mean = dense.mean(measure)
    ratio = pd.mean(measure) / mean
    pairs = zip(pd.values[measure], dense.values[measure], strict=True)
    moved = {"ratio": tuple((mine - ratio * theirs) / mean for mine, theirs in pairs)}
    nothing = {"ratio": (0.0,) * len(dense.groups)}
    subjects = dense.subjects
    return (
        Measured(dense.task, dense.groups, moved, subjects)
        .against(Measured(dense.task, dense.groups, nothing, subjects), "ratio")
        .stderr
    )
