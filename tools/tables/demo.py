"""What `make demo`, `make headline` and `make claims` measured: a pruned pair beside the dense one."""

from __future__ import annotations

from typing import Any

from tables.base import interval, table, where

TIMES = ("TTFT p50", "ITL p50", "E2E p50", "output tokens/s", "KV transfer time")


def demo(data: dict[str, Any]) -> str:
    """The figures of one run. Bytes are given against the bfloat16 pool that a GPU would serve, times as ratios."""
    plan, transfer, quality, fidelity = (data[key] for key in ("plan", "transfer", "quality", "fidelity"))
    dense, pruned = data["load"]["dense"], data["load"]["pruned"]
    controls = f"{fidelity['controls_detected']} of {fidelity['controls']} wrong plans told apart"
    counted, planned = transfer["measured_bytes"], transfer["planned_bytes"]
    halved, error, link = transfer["dense_bytes"] / 2, quality.get("stderr"), data.get("link")
    rows = [
        ("blocks run in prefill", plan["blocks"], _run(plan, "prefill")),
        ("blocks run in decode", plan["blocks"], _run(plan, "decode")),
        (
            f"KV bytes a request, {transfer['prompt_tokens']:.0f} prompt tokens",
            f"{halved:,.0f} (a bfloat16 pool, by arithmetic)",
            f"{counted:,.0f} counted on the wire, {planned:,.0f} planned: {halved / counted:.2f}x less",
        ),
        (
            "the same against this run's float32 pool, which nobody serves",
            f"{transfer['dense_measured_bytes']:,.0f} counted",
            f"{transfer['reduction']:.2f}x less",
        ),
        *_memory(data.get("memory")),
        (
            f"perplexity on held-out text; {'no error was recorded' if error is None else '± is one paired error'}",
            f"{quality['dense_ppl']:.2f}",
            f"{quality['pd_ppl']:.2f} = {quality['ratio']:.2f}x{'' if error is None else f' ± {error:.2f}'}",
        ),
        (
            f"served against oracle, {fidelity['requests']} prompts",
            "",
            f"{fidelity['max_logprob_error']:.1e} nats at most; {controls}",
        ),
        ("requests failed", f"{dense['failed']} of {dense['requests']}", f"{pruned['failed']} of {pruned['requests']}"),
        *((name, "1", _time(data["ratios"], name)) for name in TIMES if interval(data["ratios"], name)),
    ]
    times = ["times are ratios over interleaved rounds, with 95% intervals (paired t on logarithms)"]
    times += [] if link is None else [_link(link)]
    return table(("", "dense", "pruned"), rows) + where(data["environment"], "computed in float32", *times)


def demolimited(data: dict[str, Any] | None) -> str:
    """The same of `make demo-limited`."""
    return "Not measured yet: `make demo-limited`." if data is None else demo(data)


def headline(data: dict[str, Any] | None) -> str:
    """The same of `make headline`."""
    return "Not measured yet: `make headline`." if data is None else demo(data)


def _time(ratios: list[dict[str, Any]], name: str) -> str:
    """With its interval; an interval that holds 1 is a tie."""
    (figure,) = (row for row in ratios if row["figure"] == name)
    return interval(ratios, name) + (", a tie" if figure["low"] <= 1 <= figure["high"] else "")


def _memory(memory: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    rows = {
        "decode_request": "decode's KV pool, one request",
        "prefill_weights": "prefill's weights",
        "decode_weights": "decode's weights",
    }
    if memory is None:
        return []
    dense, pruned = memory["dense"], memory["pruned"]
    return [
        (label, f"{dense[name] / 1e6:,.0f} MB", f"{pruned[name] / 1e6:,.0f} MB = {pruned[name] / dense[name]:.2f}x")
        for name, label in rows.items()
    ]


def _link(link: dict[str, Any]) -> str:
    share, relay = link["ttft_share"]["dense"], link["relays"]["dense"]
    return (
        f"KV over a link of {link['speed']} for a bfloat16 pool (dense's float32 KV: {relay}), on which it spends "
        f"{share:.0%} of dense's TTFT"
    )


def _run(plan: dict[str, Any], stage: str) -> str:
    run = plan["blocks"] - len(plan[f"{stage}_dropped"]) - plan.get(f"{stage}_pairs", 0)
    alone = plan.get(f"{stage}_kv_only")
    return f"{run}, {len(alone)} of them for K and V alone" if alone else f"{run}"
