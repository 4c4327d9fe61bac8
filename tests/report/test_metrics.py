from dataclasses import dataclass

import pytest
from rich.console import Console

from pdtrim_deploy.evaluation.quality import Quality, Score
from pdtrim_deploy.loadtest import LoadResult, LoadRun, Outcome
from pdtrim_deploy.plan import Drop, Keep, KVSend, ModelShape, PDPlan
from pdtrim_deploy.recipe import EvaluationSection
from pdtrim_deploy.report.metrics import FidelityFigures, LoadFigures, Metrics, QualityFigures
from pdtrim_deploy.report.plan_figures import PlanFigures, TransferFigures, from_bfloat16
from pdtrim_deploy.report.tables import load_table, plan_table

SHAPE = ModelShape(
    architecture="LlamaForCausalLM", fingerprint="f", num_blocks=3, num_kv_heads=2, head_dim=4, kv_dtype="float32"
)
PLAN = PDPlan(
    model=SHAPE,
    prefill=(Keep(),) * 3,
    decode=(Keep(), Drop(), Keep()),
    kv=(KVSend(mode="sparse", n_first=1, n_last=4), KVSend()),
)
ROW = 2 * 2 * 4 * 4  # K and V, heads, head size, bytes


@dataclass(frozen=True)
class Count:
    requests: int
    payload_bytes: int


def metrics(failed: bool = False, passed: bool = True, off_by: int = 0) -> Metrics:
    good = Outcome(ttft=0.1, itl=(0.02,), e2e=0.12, prompt_tokens=10, output_tokens=2)
    bad = (Outcome("timeout", "late"),) if failed else ()
    figures = LoadFigures.of(LoadResult.of("builtin", [LoadRun((good, *bad), 1.0)]))
    return Metrics(
        plan=PlanFigures.of(PLAN),
        transfer=TransferFigures.of(PLAN, [10], Count(1, 15 * ROW + off_by), Count(1, 30 * ROW)),
        quality=QualityFigures(dense_ppl=10.0, pd_ppl=11.0, ratio=1.1),
        fidelity=FidelityFigures(
            requests=24, max_logprob_error=1e-5, tolerance=1e-3, controls=3, controls_detected=3, passed=passed
        ),
        load={"dense": figures, "pruned": figures},
        environment={},
    )


def test_plan_figures() -> None:
    seen = PlanFigures.of(PLAN)
    assert (seen.blocks, seen.prefill_dropped, seen.decode_dropped) == (3, [], [1])
    assert (seen.sparse_layers, seen.n_first, seen.n_last, seen.wire_dtype) == (1, 1, 4, "native")
    assert PlanFigures.of(PDPlan.dense(SHAPE)).n_first is None


def test_transfer_averages_and_notices_a_single_byte() -> None:
    seen = TransferFigures.of(PLAN, [10, 20], Count(2, 40 * ROW), Count(2, 90 * ROW))
    assert (seen.prompt_tokens, seen.dense_bytes, seen.planned_bytes) == (15, 45 * ROW, 20 * ROW)
    assert (seen.measured_bytes, seen.dense_measured_bytes, seen.reduction) == (20 * ROW, 45 * ROW, 2.25)
    assert (seen.bfloat16_dense_bytes, seen.bfloat16_reduction) == (45 * ROW / 2, 1.125)
    assert seen.exact
    assert not TransferFigures.of(PLAN, [10, 20], Count(2, 40 * ROW + 1), Count(2, 90 * ROW)).exact
    assert not TransferFigures.of(PLAN, [10, 20], Count(2, 40 * ROW), Count(2, 90 * ROW - 1)).exact
    assert TransferFigures.of(PLAN, [10], Count(0, 0), Count(0, 0)).reduction == 0


@pytest.mark.parametrize(
    ("changes", "problems"),
    [({}, 0), ({"failed": True}, 2), ({"passed": False}, 1), ({"off_by": 1}, 1)],
)
def test_problems_are_named(changes: dict, problems: int) -> None:
    assert len(metrics(**changes).problems) == problems


def test_the_keys_that_others_read(tmp_path) -> None:
    metrics().write(tmp_path / "report" / "metrics.json")
    import json

    seen = json.loads((tmp_path / "report" / "metrics.json").read_text())
    expected = {
        "plan": "digest blocks prefill_dropped decode_dropped sparse_layers n_first n_last wire_dtype",
        "transfer": "prompt_tokens dense_bytes planned_bytes measured_bytes reduction",
        "quality": "dense_ppl pd_ppl ratio",
        "fidelity": "requests max_logprob_error controls_detected",
    }
    for section, keys in expected.items():
        assert set(keys.split()) <= set(seen[section])
    for pair in ("dense", "pruned"):
        assert {"requests", "failed", "ttft_ms_p50", "itl_ms_p50", "output_tokens_per_s"} <= set(seen["load"][pair])
    assert "environment" in seen


def test_a_bfloat16_pool_halves_what_travels_native_and_nothing_else() -> None:
    quantised = PLAN.with_kv(tuple(send.model_copy(update={"wire_dtype": "int8"}) for send in PLAN.kv))
    assert from_bfloat16(PLAN).payload_bytes(10) == PLAN.payload_bytes(10) / 2
    assert from_bfloat16(quantised).payload_bytes(10) == quantised.payload_bytes(10)


def quality(dense: list[float], pd: list[float], documents: tuple[int, ...] = ()) -> Quality:
    text = EvaluationSection(corpus="brown")
    scores = {name: Score(ppl=1.0, nll=0.0, nll_per_sequence=nll) for name, nll in (("dense", dense), ("pd", pd))}
    shared = {"plan_digest": "d", "corpus_sha256": "c", "tokens": 9, "dtype": "float32", "environment": {}}
    return Quality(text=text, ratio=1.1, documents=documents, **scores, **shared)


def test_the_error_of_perplexity_is_paired() -> None:
    """Sequences differ by nats, their rises by hundredths: only the latter count."""
    seen = QualityFigures.of(quality([1.0, 5.0, 9.0], [1.1, 5.12, 9.08]))
    assert seen.stderr == pytest.approx(1.1 * 0.02 / 3**0.5)
    assert QualityFigures.of(quality([1.0], [1.1])).stderr is None


def test_windows_of_one_document_are_no_independent_ones() -> None:
    """The same two rises again, of the same two documents, are no more evidence; of one document, there is none."""
    twice = QualityFigures.of(quality([1.0, 5.0, 2.0, 6.0], [1.1, 5.12, 2.1, 6.12], (0, 1, 0, 1))).stderr
    assert twice == pytest.approx(QualityFigures.of(quality([1.0, 5.0], [1.1, 5.12])).stderr)
    assert QualityFigures.of(quality([1.0, 5.0], [1.1, 5.12], (0, 0))).stderr is None


def test_tables_fit_a_terminal() -> None:
    console = Console(width=80, record=True)
    figures = metrics()
    for table in (plan_table(PLAN, 10), load_table({n: f.detail for n, f in figures.load.items()})):
        console.print(table)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "first 1 + last 4" in text


def test_an_fp8_pool_is_compared_with_a_bfloat16_one_too():
    plan = PDPlan.dense(SHAPE.with_pool("fp8_e4m3"))
    assert from_bfloat16(plan).dense_bytes(10) == 2 * plan.dense_bytes(10)
