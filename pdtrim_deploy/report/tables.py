"""Plans, loads and metrics as rich tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from pdtrim_deploy.loadtest.base import LoadResult
from pdtrim_deploy.loadtest.rounds import Ratio
from pdtrim_deploy.loadtest.workers import Histogram
from pdtrim_deploy.plan import PDPlan


def plan_table(plan: PDPlan, prompt_tokens: int) -> Table:
    """Block by block: what each stage does, and the KV rows and bytes that travel (unified: stay) for one prompt."""
    table = Table(
        "block", "prefill", "decode", "KV", "rows", "bytes", title=f"plan {plan.digest[:12]} at {prompt_tokens} tokens"
    )
    for column in table.columns[-2:]:
        column.justify = "right"
    layer_of = {block: layer for layer, block in enumerate(plan.decode_kv_blocks)}
    for block, (before, after) in enumerate(zip(plan.prefill, plan.decode, strict=True)):
        cells = [str(block), before.kind, after.kind]
        if block in layer_of:
            send = plan.kv[layer_of[block]]
            size = plan.layer_bytes(layer_of[block], prompt_tokens)
            less = f", {plan.key_offsets.form}" if plan.key_offsets and plan.has_key_offset(layer_of[block]) else ""
            cells += [f"{send.row_names}, {send.wire_dtype}{less}", str(send.rows(prompt_tokens)), f"{size:,}"]
        elif plan.model.states and block in plan.model.states.blocks:
            cells += ["a state, native", "", f"{plan.model.state_bytes // len(plan.model.states.blocks):,}"]
        table.add_row(*cells)
    kv = f"{plan.payload_bytes(prompt_tokens):,} bytes a request"
    more = "one model for both stages, no KV travels" if plan.unified else plan.reductions(prompt_tokens)
    tail = f"; kv_only: but for a prompt's last {plan.kv_only_tail} tokens" if plan.kv_only_tail else ""
    table.caption = f"{kv}: {more}{tail}"
    return table


def load_table(results: dict[str, LoadResult]) -> Table:
    """One column per load."""
    table = Table("", *results, title="load")
    for column in table.columns[1:]:
        column.justify = "right"
    rows: dict[str, Any] = {
        "requests": lambda r: str(r.requests),
        "failed": lambda r: str(r.failed) + "".join(f", {kind} {n}" for kind, n in r.failures.items()),
        "output tokens/s": lambda r: f"{r.output_tokens_per_s:.1f}",
    }
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
        rows[f"{name.removesuffix('_ms').upper()} ms p50/p90/p99"] = lambda r, name=name: " / ".join(
            "-" if v is None else f"{v:.0f}" for v in (getattr(getattr(r, name), p) for p in ("p50", "p90", "p99"))
        )
    if any(result.good is not None for result in results.values()):
        rows["within the SLO"] = lambda r: "-" if r.good is None else f"{r.good} of {r.requests}"
        rows["goodput, requests/s"] = lambda r: "-" if r.good is None else f"{r.goodput_requests_per_s:.2f}"
    if any(result.workers is not None for result in results.values()):
        rows["KV bytes a request"] = _kv_bytes
        rows["KV transfer ms mean/p95"] = lambda r: _times(r.workers and r.workers.transfer)
        for name in dict.fromkeys(name for r in results.values() if r.workers for name in r.workers.queues):
            rows[f"{name.replace('_', ' ')} ms mean/p95"] = lambda r, name=name: _times(
                r.workers and r.workers.queues.get(name)
            )
    for label, cell in rows.items():
        table.add_row(label, *(cell(result) for result in results.values()))
    return table


def ratio_table(first: str, second: str, ratios: Iterable[Ratio]) -> Table:
    """Ratios with their 95% intervals, and the smallest and largest ratio of a round."""
    table = Table("", "ratio", "95% interval", "least - most", title=f"{second} over {first}, paired by round")
    for column in table.columns[1:]:
        column.justify = "right"
    for ratio in ratios:
        spread = f"{min(ratio.rounds):.3f} - {max(ratio.rounds):.3f}"
        table.add_row(ratio.figure, f"{ratio.ratio:.3f}", f"{ratio.low:.3f} - {ratio.high:.3f}", spread)
    return table


def _kv_bytes(result: LoadResult) -> str:
    counted = result.workers
    return f"{counted.payload_bytes / counted.requests:,.0f}" if counted and counted.requests else "-"


def _times(histogram: Histogram | None) -> str:
    return (
        "-"
        if histogram is None
        else f"{histogram.mean_ms:.0f} / {'-' if histogram.p95_ms is None else f'{histogram.p95_ms:.0f}'}"
    )
