"""What a bundle costs, task by task: the dense model and the bundle on the same items, compared in pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.evaluation import corpora
from pdtrim_deploy.evaluation.limits import STREAMED_KV, fit_judging
from pdtrim_deploy.evaluation.lm_harness import Harness
from pdtrim_deploy.evaluation.lm_harness.scoring import HandOver
from pdtrim_deploy.evaluation.quality import source_of
from pdtrim_deploy.evaluation.recovery import Recovery, check_gate
from pdtrim_deploy.evaluation.tasks.base import KV_TOKENS, Measured, Setting
from pdtrim_deploy.evaluation.tasks.registry import check, prepare
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import ON_CPU, Compute
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import STAGES, PDPlan
from pdtrim_deploy.recipe import EvaluationSection


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

    `weights` are the items' of those measures whose means are weighted, as lm-eval's by words.
    """

    task: str
    figures: tuple[Figure, ...]
    groups: tuple[str, ...]
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
            dense=dense.values,
            pd=pd.values,
            weights=dict(dense.weights),
        )


class TasksReport(_Frozen):
    """All tasks asked for; the text is that of the corpus's final split, `corpus_sha256` names it.

    `dtype`, `computed_in` and `device` are as in `Quality`; `hand_over` is what lm-eval's tasks were given, None for
    their defaults.
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
    recovery: tuple[Recovery, ...] = ()
    environment: dict[str, Any]


def judge_tasks(
    bundle: Bundle,
    names: Sequence[str],
    cache: Cache,
    environment: dict[str, Any],
    section: EvaluationSection | None = None,
    size: int | None = None,
    note: Callable[[str], None] = lambda _: None,
    compute: Compute | None = None,
    harness: Harness | None = None,
) -> TasksReport:
    """Measure the stage models as written, behind the plan, and the source model behind a dense plan.

    The models of only one of the two are in memory at a time.

    Args:
        section: corpus and seed; the recipe's when left out.
        size: items of each task, in its own unit; each task's default when left out.
        compute: as of `judge_bundle`.
        harness: tasks of lm-eval besides; each question and its answers go to `reports/lm_eval/{dense,pd}`.

    Raises:
        UserError: a gate of a measure whose direction is unknown, an unknown task, one that does not fit the model or
            its data, or what `judge_bundle` raises.

    """
    from pdtrim_deploy.models.loading import load_tokenizer
    from pdtrim_deploy.models.on_devices import load_to_compute

    for name in names:
        check(name)
    if harness is not None:
        harness.check()
    section, dtype, plan = section or bundle.recipe.evaluation, bundle.recipe.model.dtype, bundle.plan
    compute = ON_CPU.fast(dtype) if compute is None else compute
    source = source_of(bundle, cache, note)
    compute = fit_judging(([bundle.prefill_dir, bundle.decode_dir], [source.path]), KV_TOKENS, compute)
    corpus = corpora.load(section.corpus, cache, note)
    model = load_to_compute("dense", source.path, dtype, note, compute)
    whole = PDOracle(model, model, PDPlan.dense(plan.model))
    tokenizer = load_tokenizer(source.path)
    setting = Setting(tokenizer, whole, corpus.split("final"), cache, section.seed, size, note)
    prepared = [prepare(name, setting) for name in names]
    kv_bytes = compute.states(STREAMED_KV) if compute.streams(plan.model.num_blocks) else 0

    def measured(who: str, oracle: PDOracle) -> list[Measured]:
        def progress(line: str) -> None:
            note(f"{who} {line}")

        results = [task.measure([oracle], progress, kv_bytes=kv_bytes)[0] for task in prepared]
        if harness is None:
            return results
        samples = bundle.reports_dir / "lm_eval" / who.lower()
        return results + harness.measure(oracle, tokenizer, samples, lambda line: note(f"{who} lm-eval: {line}"))

    dense = measured("dense", whole)
    for result in dense:
        check_gate(result, bundle.recipe.quality)
    del model, whole, setting
    prefill, decode = (load_to_compute(stage, bundle.stage_dir(stage), dtype, note, compute) for stage in STAGES)
    stages = PDOracle(prefill, decode, plan, KeyOffsets.read(bundle.prefill_dir, plan))
    pd = measured("PD", stages)
    return TasksReport(
        plan_digest=plan.digest,
        corpus=section.corpus,
        corpus_sha256=corpus.digest,
        seed=section.seed,
        dtype=dtype,
        computed_in=compute.dtype,
        device=compute.names,
        hand_over=None if harness is None else harness.hand_over,
        tasks=tuple(TaskFigures.of(*pair) for pair in zip(dense, pd, strict=True)),
        recovery=tuple(Recovery.of(*pair, bundle.recipe.quality) for pair in zip(dense, pd, strict=True)),
        environment=environment,
    )


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
