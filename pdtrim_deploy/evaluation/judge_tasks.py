"""The dense model and a bundle on the same items of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.evaluation import corpora
from pdtrim_deploy.evaluation.bundle_oracle import oracle_of
from pdtrim_deploy.evaluation.limits import STREAMED_KV, fit_judging
from pdtrim_deploy.evaluation.lm_harness import Harness
from pdtrim_deploy.evaluation.measured import Measured
from pdtrim_deploy.evaluation.quality import source_of
from pdtrim_deploy.evaluation.recovery import Recovery, check_gate
from pdtrim_deploy.evaluation.task_report import TaskFigures, TasksReport
from pdtrim_deploy.evaluation.tasks.base import KV_TOKENS, Setting
from pdtrim_deploy.evaluation.tasks.registry import check, prepare
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.local.compute import ON_CPU, Compute
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import PDPlan
from pdtrim_deploy.recipe import EvaluationSection


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
    compute = fit_judging((bundle.weight_folders, [source.path]), KV_TOKENS, compute)
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
    pd = measured("PD", oracle_of(bundle, note, compute))
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
        calibrated_on=bundle.recipe.calibrated_on(result.task for result in dense),
        recovery=tuple(Recovery.of(*pair, bundle.recipe.quality) for pair in zip(dense, pd, strict=True)),
        environment=environment,
    )
