"""What a bundle costs, task by task: each measure of the dense model and of the bundle, and their paired difference."""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.evaluation.lm_harness.scoring import HandOver
from pdtrim_deploy.evaluation.measured import Measured
from pdtrim_deploy.evaluation.recovery import Recovery


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_Frozen):
    """Means over `items` items of one group (None: all); `difference` is PD minus dense, `stderr` its standard error.

    `stderr` is None for a single text.
    """

    measure: str
    group: str | None
    items: int
    dense: float
    pd: float
    difference: float
    stderr: float | None


class TaskFigures(_Frozen):
    """One task; `dense` and `pd` hold each measure's value of every item, `groups` what the item counts under.

    Items of equal `subjects` are of one document or text, and count as one in standard errors; empty: each is its own.
    `weights` are the items' of those measures whose means are weighted, as lm-eval's by words.
    """

    task: str
    figures: tuple[Figure, ...]
    groups: tuple[str, ...]
    subjects: tuple[int, ...] = ()
    dense: dict[str, tuple[float, ...]]
    pd: dict[str, tuple[float, ...]]
    weights: dict[str, tuple[float, ...]] = {}

    @classmethod
    def of(cls, dense: Measured, pd: Measured) -> TaskFigures:
        """Every measure over all items and, where there are several, by group."""
        groups: list[str | None] = list(dict.fromkeys(dense.groups))
        reported = [None, *groups] if len(groups) > 1 else [None]
        figures = [_figure(dense, pd, measure, group) for measure in dense.values for group in reported]
        return cls(
            task=dense.task,
            figures=tuple(figures),
            groups=dense.groups,
            subjects=dense.subjects,
            dense=dense.values,
            pd=pd.values,
            weights=dict(dense.weights),
        )


class TasksReport(_Frozen):
    """All tasks asked for; the text is that of the corpus's final split, `corpus_sha256` names it.

    `dtype`, `computed_in` and `device` are as in `Quality`; `hand_over` is that of lm-eval's tasks, None for their
    defaults. The bundle's calibration text has some questions of the tasks in `calibrated_on`.
    """

    plan_digest: str
    corpus: str
    corpus_sha256: str
    seed: int
    dtype: str
    computed_in: str | None = None
    device: str | None = None
    hand_over: HandOver | None = None
    tasks: tuple[TaskFigures, ...]
    calibrated_on: tuple[str, ...] = ()
    recovery: tuple[Recovery, ...] = ()
    environment: dict[str, Any]


def _figure(dense: Measured, pd: Measured, measure: str, group: str | None) -> Figure:
    paired = pd.against(dense, measure, group)
    return Figure(
        measure=measure,
        group=group,
        items=paired.count,
        dense=dense.mean(measure, group),
        pd=pd.mean(measure, group),
        difference=paired.mean,
        stderr=None if math.isnan(paired.stderr) else paired.stderr,
    )
