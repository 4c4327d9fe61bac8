"""Served pairs: engines, pruned beside dense, faults, the simulation's error."""

from __future__ import annotations

from typing import Any

from tables.base import ratio, table, where


def engines(data: dict[str, Any]) -> str:
    """Engines in SGLang's workers beside its torch model, and what the attention callback costs."""
    rows = []
    for row in (row for row in data["rows"] if "concurrency" in row):
        ratios = [row[key] for key in ("ttft_ratio", "itl_ratio")]
        rows.append((row["concurrency"], *map(ratio, ratios)))
    calls = [row for row in data["rows"] if "outside_us" in row]
    said = "; ".join(f"{row['stage']}, {row['tokens']} tokens: {row['outside_us']:.0f} us" for row in calls)
    shares = f"{min(row['share'] for row in calls):.1%} to {max(row['share'] for row in calls):.1%} of the graph's time"
    head = ("requests at once", "TTFT, onnxruntime / torch", "ITL, onnxruntime / torch")
    tail = f"\n\nThe attention callback costs, a layer and outside of the attention itself: {said} ({shares})."
    rounds = (
        f"median (least-most) of {data['options']['rounds']} interleaved rounds, {data['options']['prompt']} tokens in"
    )
    return table(head, rows) + tail + where(data["environment"], rounds, f"{data['options']['output']} out")


def compare(data: dict[str, Any]) -> str:
    """Pruned over dense beside what the plan predicts."""
    rows = []
    for row in data["rows"]:
        share = row["of_saving"] if row["part"] == "decode" else row["of_factor"]
        what = "saving" if row["part"] == "decode" else "factor"
        goal = f"{share:.0%} of the {what} (goal {row['goal']:.0%})"
        rows.append((row["figure"], f"{row['predicted']:.3f}", ratio(row, "ratio", "low", "high"), goal))
    asked = data["options"]
    said = (
        f"{asked['prefill_blocks']} and {asked['decode_blocks']} of 30 blocks removed; transfer over a relay of "
        f"{asked['link']} on loopback"
    )
    head = ("pruned / dense", "predicted", "measured (95% interval)", "reached")
    return table(head, rows) + where(data["environment"], f"{asked['rounds']} interleaved rounds", said)


def faults(data: dict[str, Any]) -> str:
    """What every fault did to the requests under way."""
    keys = ("sent", "answered", "aborted", "failed", "lost", "wrong", "slowest_s", "recovered_s")
    rows = [(f"{row['fault']} ({row['transport']})", *(row[key] for key in keys)) for row in data["rows"]]
    head = (
        "fault",
        "sent",
        "answered",
        "hung up",
        "failed, with a word",
        "hung",
        "wrong text",
        "slowest, s",
        "back after, s",
    )
    return table(head, rows) + where(data["environment"])


def simulation(data: dict[str, Any]) -> str:
    """Error of the simulation against the measured pair, by load."""
    rows = [r for r in data["rows"] if r.get("used")]
    figures = ("ttft_ms p50", "itl_ms p50", "e2e_ms p50", "e2e_ms p90", "output tokens/s")
    body = [(r["load"], r["used"], *(f"{r['errors'][name]:+.0%}" for name in figures)) for r in rows]
    head = ("load", "used as", "TTFT p50", "ITL p50", "E2E p50", "E2E p90", "output tokens/s")
    return table(head, body) + where(data["environment"], f"{data['options']['rounds']} rounds")


def served(data: dict[str, Any]) -> str:
    """Each wire dtype alone, served: bytes counted and planned, error and what is allowed."""
    rows = [
        (
            row["wire"], f"{row['counted']:,}", f"{row['planned']:,}", f"{row['error']:.1e}", f"{row['allowed']:.1e}",
            f"{row['controls_detected']} of {row['controls']}", "yes" if row["passed"] else "**no**",
        )
        for row in data["rows"]
    ]  # fmt: skip
    head = (
        "wire dtype",
        "bytes counted",
        "planned",
        "worst error, nats",
        "allowed",
        "wrong plans told apart",
        "passed",
    )
    prompts = data["rows"][0]["prompts"]
    said = f"{prompts} prompts of the fidelity check; pages of 16 tokens, chunks of 64"
    return table(head, rows) + where(data["environment"], said)
