"""Load: measured between two pairs, and computed for a cluster."""

from __future__ import annotations

from typing import Any

from pdtrim_deploy.report.html import charts
from pdtrim_deploy.report.html.collect import Findings
from pdtrim_deploy.report.html.footing import loads_of, number, provenance, seed_of
from pdtrim_deploy.report.html.markup import Markup, join, table, tag
from pdtrim_deploy.report.workers_table import goal_text, workers_rows
from pdtrim_deploy.simulation import SizedSide
from pdtrim_deploy.sizing import Link


def load(findings: Findings) -> Markup | None:
    """Ratios with intervals; absolute figures folded away."""
    parts = []
    for name, comparison in loads_of(findings).items():
        rows = [(ratio["figure"], ratio["low"], ratio["ratio"], ratio["high"]) for ratio in comparison["ratios"]]
        parts.append(tag("h3", name))
        if rows:
            rounds = len(comparison["ratios"][0]["rounds"])
            text = (
                f"Ratio in each of {rounds} interleaved rounds: geometric mean and 95% interval (paired t), coloured "
                "where it leaves 1 out."
            )
            text += _link(comparison.get("link"))
            parts += [tag("p", text), charts.intervals(rows, name)]
        parts += [tag("p", sentence) for sentence in comparison.get("dropped", ())]
        load_of = {side: ratio.get("detail", ratio) for side, ratio in comparison["load"].items()}
        parts += [tag("p", tag("strong", f"{side}: "), why) for side, why in _warnings(load_of)]
        head = ("absolute, for the record", *load_of)
        figures: list[list[Any]] = [
            ["requests failed", *(f"{r['failed']} of {r['requests']}" for r in load_of.values())]
        ]
        for key in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
            cells = (" / ".join(number(r[key][p], 0) for p in ("p50", "p90", "p95", "p99")) for r in load_of.values())
            figures.append([f"{key.removesuffix('_ms').upper()} ms p50/p90/p95/p99", *cells])
        for queue in ("prefill_queue", "decode_queue"):
            waits = [((r.get("workers") or {}).get("queues") or {}).get(queue) for r in load_of.values()]
            if any(waits):
                cells = (f"{number(w['mean_ms'], 0)} / {number(w['p95_ms'], 0)}" if w else "-" for w in waits)
                figures.append([f"{queue.replace('_', ' ')} ms mean/p95", *cells])
        figures.append(["output tokens/s", *(number(r["output_tokens_per_s"], 2) for r in load_of.values())])
        parts.append(tag("details", tag("summary", "absolute figures of this machine"), table(head, figures)))
        parts.append(provenance(comparison, seed_of(comparison)))
    return join(parts) if parts else None


def workers(findings: Findings) -> Markup | None:
    """How large a cluster: computed, and simulated where the report says so."""
    report = findings.reports.get("sizing")
    if report is None or "workers" not in report:
        return None
    traffic, workers = report["traffic"], report["workers"]
    sides = {name: SizedSide.model_validate(side) for name, side in workers["sides"].items()}
    link = f"{Link(traffic['link_bits_per_s'])} link{' of each prefill worker' if workers['link_each'] else ''}"
    goal = goal_text(traffic["rate"], workers["slo"]["ttft_s"], workers["slo"]["itl_s"])
    simulated = any(side.simulated for side in sides.values())
    notes = [
        tag("p", f"{goal}; {traffic['isl']} tokens in, {traffic['osl']} out, {link}."),
        table(("", *sides), workers_rows(sides)),
        *(tag("p", tag("strong", f"{n}: "), side.sizing.problem) for n, side in sides.items() if side.sizing.problem),
        *(tag("p", tag("strong", "doubtful rates: "), doubt) for doubt in workers.get("rates", {}).get("doubts", ())),
        tag("p", f"Computed{', and simulated, ' if simulated else ' '}not measured, from rates of one worker each. "
            f"Assumed: {workers['assumed']}."),
    ]  # fmt: skip
    return join([*notes, provenance(report, "rates as in the command")])


def _link(link: str | dict[str, Any] | None) -> str:
    """What KV went over: one relay's speed in a comparison; in a demo each pair's, and the link that they stand for."""
    if link is None:
        return ""
    if isinstance(link, str):
        return f" KV went over a relay on loopback that lets {link} through."
    relays = ", ".join(f"{speed} for the {name} pair" for name, speed in link["relays"].items())
    return (
        f" KV went over relays on loopback that stand for a link of {link['speed']} behind a bfloat16 pool: {relays}, "
        "as much faster as its own KV is wider."
    )


def _warnings(loads: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (side, result["client"]["bottleneck"])
        for side, result in loads.items()
        if result.get("client", {}).get("bottleneck")
    ]
