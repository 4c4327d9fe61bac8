"""The demo's table: exact figures as such, what lies outside its interval as a saving, all else as a tie."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.console import Console

from pdtrim_deploy.loadtest.rounds import Ratio
from pdtrim_deploy.plan import Keep, KVOnly
from pdtrim_deploy.report.html.plan_picture import plan_picture
from pdtrim_deploy.report.metrics import LinkFigures, MemoryFigures, Metrics, QualityFigures
from pdtrim_deploy.report.plan_figures import PlanFigures
from pdtrim_deploy.report.savings import notes, savings, savings_table
from pdtrim_deploy.report.tables import plan_table

sys.path.insert(0, str(Path(__file__).parent))
from test_metrics import PLAN, metrics

LINK = LinkFigures(
    speed="50 Mb/s", relays={"dense": "100 Mb/s", "pruned": "50 Mb/s"}, ttft_share={"dense": 0.49, "pruned": 0.2}
)
MEMORY = {
    name: MemoryFigures(prefill_weights=size, decode_weights=size, decode_request=size // 2)
    for name, size in (("dense", 538_000_000), ("pruned", 400_000_000))
}


def with_all(**changes: object) -> Metrics:
    ratios = (Ratio.of("TTFT p50", [0.6, 0.62, 0.61]), Ratio.of("ITL p50", [0.9, 1.05, 0.99]))
    return metrics().model_copy(update={"ratios": ratios, "link": LINK, "memory": MEMORY} | changes)


def verdicts(results: Metrics) -> dict[str, str]:
    return {row.figure: row.verdict for row in savings(results)}


@pytest.mark.parametrize(
    ("figure", "rounds", "verdict"),
    [
        ("TTFT p50", [0.6, 0.62, 0.61], "less, a saving"),
        ("TTFT p50", [1.6, 1.62, 1.61], "more, a COST"),
        ("TTFT p50", [0.5, 1.2, 0.9], "tie"),
        ("output tokens/s", [1.3, 1.31, 1.29], "more, a saving"),
        ("output tokens/s", [0.7, 0.71, 0.69], "less, a COST"),
    ],
)
def test_a_saving_lies_outside_its_interval(figure: str, rounds: list[float], verdict: str) -> None:
    label = {"TTFT p50": "TTFT, median", "output tokens/s": "output tokens/s"}[figure]
    assert verdicts(with_all(ratios=(Ratio.of(figure, rounds),)))[label] == verdict


@pytest.mark.parametrize(
    ("ratio", "stderr", "verdict"), [(1.08, 0.03, "+8.0%"), (1.05, 0.03, "tie"), (1.05, None, "+5.0%")]
)
def test_a_loss_within_two_errors_is_a_tie(ratio: float, stderr: float | None, verdict: str) -> None:
    quality = QualityFigures(dense_ppl=10.0, pd_ppl=10.0 * ratio, ratio=ratio, stderr=stderr, tokens=768)
    assert verdicts(with_all(quality=quality))["perplexity, held-out text"] == verdict


def test_bytes_stand_against_a_bfloat16_pool_first() -> None:
    rows = {row.figure: row for row in savings(with_all())}
    assert rows["KV bytes a request, bfloat16 pool"].ratio == "1.00x fewer"
    assert rows["  from this run's own pool"].ratio == "2.00x fewer"
    assert rows["weights of decode"].ratio == "0.74"
    assert verdicts(metrics(off_by=1))["KV bytes a request, bfloat16 pool"] == "NOT AS PLANNED"


def test_a_tail_is_told_of() -> None:
    plan = PLAN.with_parts(prefill=(Keep(), Keep(), KVOnly()), kv_only_tail=16)
    assert PlanFigures.of(plan).prefill_kv_only_tail == 16
    sentence = next(notes(with_all(plan=PlanFigures.of(plan))))
    assert sentence == "Of 3 blocks prefill runs 3 (1 for K and V alone, but for a prompt's last 16 tokens), decode 2."
    picture = str(plan_picture(plan, 64))
    assert "block 2, prefill: kv_only, but for the last 16 tokens of a prompt" in picture
    assert "run for its K and V alone, but for the last 16 tokens of a prompt" in picture
    assert "but for" not in str(plan_picture(PLAN, 64))
    assert plan_table(plan, 64).caption.endswith("; kv_only: but for a prompt's last 16 tokens")


def test_the_table_fits_a_terminal_and_says_how_to_read_it() -> None:
    console = Console(width=80, record=True)
    console.print(savings_table(with_all()))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    assert "3 rounds in turns (95% interval" in words
    assert "50 Mb/s for KV of a bfloat16 pool" in words
    assert "dense 49%, pruned 20% of TTFT" in words
    assert "the relays let dense 100 Mb/s, pruned 50 Mb/s through" in words
