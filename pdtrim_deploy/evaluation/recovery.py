"""Recovery: a bundle's score over the dense model's on the same questions, its error, and the recipe's gate.

Of a mean loss in nats it is the ratio of perplexities, of any other measure the ratio of means. A gate is the most
where less of the measure is better, else the least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.measured import Measured

_LEADING = ("acc_norm", "acc", "accuracy", "exact", "prefix", "right", "exact_match", "nll")
"""The measure that stands for a task, the first of these that it has (`exact_match,FILTER` too); else its first."""


class Recovery(BaseModel):
    """`recovery` is None where the dense model scores 0; `stderr` None for a single question.

    `gate` is the recipe's, `passed` whether it is kept; both None where the recipe names no such task.
    `higher_is_better` is of the measure, None where it is unknown.
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
    higher_is_better: bool | None = None

    @classmethod
    def of(cls, dense: Measured, pd: Measured, gates: Mapping[str, float]) -> Recovery:
        """Of the task's leading measure; UserError as of `check_gate`."""
        measure, higher = leading(dense), check_gate(dense, gates)
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
        passed = None if gate is None else recovery is not None and (recovery >= gate if higher else recovery <= gate)
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
            higher_is_better=higher,
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
    bound = "at least" if row.higher_is_better else "at most"
    return f"gate {bound} {row.gate:g}: {'passed' if row.passed else 'FAILED'}"


def check_gate(result: Measured, gates: Mapping[str, float]) -> bool | None:
    """Whether more of the task's leading measure is better; None: unknown.

    Raises:
        UserError: it is unknown, and there is a gate of the task.

    """
    measure = leading(result)
    higher = result.higher_is_better.get(measure)
    if measure.startswith("nll"):
        higher = False
    elif higher is None and measure.partition(",")[0] in _LEADING:
        higher = True
    if higher is None and result.task in gates:
        raise UserError(
            f"the recipe has a gate for {result.task}, and whether more or less of {measure} is better is unknown; "
            "add higher_is_better to the metric in the task's YAML, or take the gate out"
        )
    return higher


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
    moved = {"ratio": tuple((score - ratio * base) / mean for score, base in pairs)}
    nothing = {"ratio": (0.0,) * len(dense.groups)}
    subjects = dense.subjects
    return (
        Measured(dense.task, dense.groups, moved, subjects)
        .against(Measured(dense.task, dense.groups, nothing, subjects), "ratio")
        .stderr
    )
