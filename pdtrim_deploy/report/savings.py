"""What a demo saved and what that cost, row by row: exact figures as such, times with intervals, ties by their name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from pdtrim_deploy.loadtest.rounds import FIGURES, Ratio
from pdtrim_deploy.report.metrics import Metrics

# Figure of `loadtest.rounds` -> its label, and the form of an absolute value.
TIMES = {
    "KV transfer time": ("KV transfer, mean", "{:,.0f} ms"),
    "TTFT p50": ("TTFT, median", "{:,.0f} ms"),
    "ITL p50": ("ITL, median", "{:,.1f} ms"),
    "E2E p50": ("end to end, median", "{:,.0f} ms"),
    "output tokens/s": ("output tokens/s", "{:,.1f}"),
}
PAIRS = ("dense", "pruned")


@dataclass(frozen=True)
class Saving:
    """One row, in words: a figure of both pairs, PDTrim's over dense, and what follows from it."""

    figure: str
    dense: str
    pruned: str
    ratio: str
    verdict: str


def savings(metrics: Metrics) -> Iterator[Saving]:
    """Rows in the order of a request's way: bytes, times, memory, quality, and whether the pair is what was planned."""
    transfer, quality, fidelity = metrics.transfer, metrics.quality, metrics.fidelity
    exact = "exact" if transfer.exact else "NOT AS PLANNED"
    yield Saving(
        "KV bytes a request, bfloat16 pool", _bytes(transfer.bfloat16_dense_bytes), _bytes(transfer.measured_bytes),
        f"{transfer.bfloat16_reduction:.2f}x fewer", exact,
    )  # fmt: skip
    if transfer.dense_bytes != transfer.bfloat16_dense_bytes:
        yield Saving(
            "  from this run's own pool", _bytes(transfer.dense_measured_bytes), _bytes(transfer.measured_bytes),
            f"{transfer.reduction:.2f}x fewer", exact,
        )  # fmt: skip
    ratios = {ratio.figure: ratio for ratio in metrics.ratios}
    yield from (_timed(metrics, ratios[figure]) for figure in TIMES if figure in ratios)
    yield from _memory(metrics)
    error = "" if quality.stderr is None else f" ± {quality.stderr:.3f}"
    yield Saving(
        "perplexity, held-out text", f"{quality.dense_ppl:.2f}", f"{quality.pd_ppl:.2f}", f"{quality.ratio:.3f}{error}",
        _rise(quality.ratio, quality.stderr),
    )  # fmt: skip
    yield Saving(
        f"fidelity, {fidelity.requests} prompts", "", f"{fidelity.max_logprob_error:.1e} nats off",
        f"{fidelity.controls_detected} of {fidelity.controls} wrong plans", "passed" if fidelity.passed else "FAILED",
    )  # fmt: skip
    failed = [f"{metrics.load[name].failed} of {metrics.load[name].requests}" for name in PAIRS]
    yield Saving("requests failed", failed[0], failed[1], "", "")


def savings_table(metrics: Metrics) -> Table:
    """The same as a table, with a caption that says how to read it."""
    table = Table("", "dense", "PDTrim", "PDTrim / dense", "verdict", title=f"plan {metrics.plan.digest[:12]}")
    for column in table.columns[1:4]:
        column.justify = "right"
    for row in savings(metrics):
        table.add_row(row.figure, row.dense, row.pruned, row.ratio, row.verdict)
    table.caption = " ".join(notes(metrics))
    return table


def notes(metrics: Metrics) -> Iterator[str]:
    """What the rows rest on, a sentence each."""
    plan = metrics.plan
    tail = f", but for a prompt's last {plan.prefill_kv_only_tail} tokens" if plan.prefill_kv_only_tail else ""
    alone = f" ({len(plan.prefill_kv_only)} for K and V alone{tail})" if plan.prefill_kv_only else ""
    yield (
        f"Of {plan.blocks} blocks prefill runs {plan.blocks - len(plan.prefill_dropped) - plan.prefill_pairs}{alone}, "
        "decode "
        f"{plan.blocks - len(plan.decode_dropped) - plan.decode_pairs}."
    )
    if metrics.ratios:
        rounds = len(metrics.ratios[0].rounds)
        yield (
            f"Times: geometric mean of {rounds} rounds in turns (95% interval: paired t on logarithms); a tie is an "
            f"interval that holds 1, and no saving."
        )
    link = metrics.link
    if link is not None:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in link.ttft_share.items() if share is not None)
        yield f"Link: {link.speed} for KV of a bfloat16 pool, alike for both; KV was on it for {shares} of TTFT."
        if any(speed != link.speed for speed in link.relays.values()):
            relays = ", ".join(f"{name} {speed}" for name, speed in link.relays.items())
            yield f"(Pools are float32 here: the relays let {relays} through, which takes as long.)"
    if metrics.quality.stderr is not None:
        yield f"± is one paired standard error over {metrics.quality.tokens} tokens."


def _timed(metrics: Metrics, ratio: Ratio) -> Saving:
    label, form = TIMES[ratio.figure]
    dense, pruned = (
        "-" if (value := FIGURES[ratio.figure](metrics.load[name].detail)) is None else form.format(value)
        for name in PAIRS
    )
    return Saving(label, dense, pruned, f"{ratio.ratio:.2f} ({ratio.low:.2f}-{ratio.high:.2f})", _verdict(ratio))


def _verdict(ratio: Ratio) -> str:
    if not ratio.differs:
        return "tie"
    rate = ratio.figure.endswith("/s")
    return ("more" if ratio.ratio > 1 else "less") + (", a saving" if (ratio.ratio > 1) == rate else ", a COST")


def _rise(ratio: float, stderr: float | None) -> str:
    """Two standard errors tell a loss from a tie."""
    if stderr is not None and abs(ratio - 1) <= 2 * stderr:
        return "tie"
    return f"{ratio - 1:+.1%}"


def _memory(metrics: Metrics) -> Iterator[Saving]:
    if metrics.memory is None:
        return
    dense, pruned = metrics.memory["dense"], metrics.memory["pruned"]
    for label, name in (
        ("decode's KV pool, one request", "decode_request"),
        ("weights of prefill", "prefill_weights"),
        ("weights of decode", "decode_weights"),
    ):
        before, after = getattr(dense, name), getattr(pruned, name)
        if before and after:
            yield Saving(label, _bytes(before), _bytes(after), f"{after / before:.2f}", "exact")


def _bytes(count: float) -> str:
    return f"{count / 1e6:,.2f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"
