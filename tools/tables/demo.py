"""What `make demo` found."""

from __future__ import annotations

from typing import Any

from tables.base import table, where


def demo(data: dict[str, Any]) -> str:
    """The demo's figures."""
    plan, transfer, quality, fidelity = (data[key] for key in ("plan", "transfer", "quality", "fidelity"))
    dense, pruned = data["load"]["dense"], data["load"]["pruned"]
    controls = f"{fidelity['controls_detected']} of {fidelity['controls']} wrong plans told apart"
    rows = [
        ("blocks run in prefill", plan["blocks"], _run(plan, "prefill")),
        ("blocks run in decode", plan["blocks"], _run(plan, "decode")),
        (
            f"KV bytes a request ({transfer['prompt_tokens']:.0f} prompt tokens), counted on the wire",
            f"{transfer['dense_measured_bytes']:,.0f}",
            f"{transfer['measured_bytes']:,.0f} = {transfer['reduction']:.2f}x less",
        ),
        (
            "... against a bfloat16 pool",
            f"{transfer['dense_bytes'] / 2:,.0f}",
            f"{transfer['dense_bytes'] / 2 / transfer['measured_bytes']:.2f}x less",
        ),
        ("... by the plan's arithmetic", f"{transfer['dense_bytes']:,.0f}", f"{transfer['planned_bytes']:,.0f}"),
        (
            "perplexity on held-out text",
            f"{quality['dense_ppl']:.2f}",
            f"{quality['pd_ppl']:.2f} = {quality['ratio']:.2f}x",
        ),
        (
            f"served against oracle, {fidelity['requests']} prompts",
            "",
            f"{fidelity['max_logprob_error']:.1e} nats at most; {controls}",
        ),
        ("requests failed", f"{dense['failed']} of {dense['requests']}", f"{pruned['failed']} of {pruned['requests']}"),
        *(
            (one["figure"], "1", f"{one['ratio']:.2f} ({one['low']:.2f} - {one['high']:.2f})")
            for one in data["ratios"]
            if one["figure"] in ("TTFT p50", "ITL p50", "E2E p50", "output tokens/s")
        ),
    ]
    return table(("SmolLM2-135M, float32", "dense", "pruned"), rows) + where(
        data["environment"], "times are ratios over interleaved rounds, with 95% intervals"
    )


def _run(plan: dict[str, Any], stage: str) -> int:
    return plan["blocks"] - len(plan[f"{stage}_dropped"]) - plan.get(f"{stage}_pairs", 0)
