"""Served pairs: fidelity by wire dtype, engines, pruned beside dense, transports, faults, the simulation's error."""

from __future__ import annotations

from math import sqrt
from statistics import fmean, median, stdev
from typing import Any

from tables.base import SMOLLM2, ratio, table, where


def engines(data: dict[str, Any]) -> str:
    """Engines in SGLang's workers beside its torch model, and what the attention callback costs."""
    rows = []
    for row in (row for row in data["rows"] if "concurrency" in row):
        ratios = [row[key] for key in ("ttft_ratio", "itl_ratio")]
        rows.append((row["concurrency"], *map(ratio, ratios)))
    calls = [row for row in data["rows"] if "outside_us" in row]
    times = "; ".join(f"{row['stage']}, {row['tokens']} tokens: {row['outside_us']:.0f} us" for row in calls)
    shares = f"{min(row['share'] for row in calls):.1%} to {max(row['share'] for row in calls):.1%} of the graph's time"
    head = (
        "requests at once; "
        "load average: of one minute, 60 s after the pairs started, a third of whose start is still in it",
        "TTFT, onnxruntime / torch",
        "ITL, onnxruntime / torch",
    )
    tail = f"\n\nThe attention callback costs, a layer and outside of the attention itself: {times} ({shares})."
    options = data["options"]
    rounds = (
        f"median (least-most) of {options['rounds']} interleaved rounds of {options['requests']} requests, "
        f"{options['prompt']} tokens in, {options['output']} out"
    )
    return table(head, rows) + tail + where(data["environment"], "computed in float32", rounds)


def compare(data: dict[str, Any]) -> str:
    """Blocks removed, KV cut and both over dense, beside what the plan predicts."""
    rows = [
        (
            row["pair"],
            row["figure"],
            "" if row["predicted"] is None else f"{row['predicted']:.3f}",
            f"{median(row['rounds']):.3f} ({min(row['rounds']):.3f}-{max(row['rounds']):.3f})",
            ratio(row, "ratio", "low", "high"),
            row["load_average"],
        )
        for row in data["rows"]
        if row["part"] != "step"
    ]
    options = data["options"]
    caption = (
        f"blocks: {options['prefill_blocks']} of 30 removed from prefill and {options['decode_blocks']} from decode; "
        f"KV: the first 4 and last 128 rows travel; transfer time, TTFT and E2E of {options['prompt']}-token prompts "
        f"over a relay of {options['link']} on loopback; ITL and tokens/s of {options['batch']} requests at once; "
        "load average: of one minute, 60 s after the pairs started, a third of whose start is still in it"
    )
    head = ("what is pruned", "over dense", "predicted by weights or bytes", "median round (least-most)",
            "geometric mean (95% interval)", "load average")  # fmt: skip
    lines = [
        f"With {' / '.join(map(str, row['blocks']))} blocks a decode step took "
        f"{' / '.join(f'{ms:.1f}' for ms in row['itl_ms'])} ms. By a line through the three of each round, "
        f"{fmean(row['outside_blocks']):.0%} ± {stdev(row['outside_blocks']) / sqrt(len(row['outside_blocks'])):.0%} "
        f"of a dense step lie outside blocks, where the LM head has {row['head_of_weights']:.0%} of the weights."
        for row in data["rows"]
        if row["part"] == "step"
    ]
    tail = "".join(f"\n\n{line}" for line in lines)
    return table(head, rows) + tail + where(data["environment"], f"{options['rounds']} interleaved rounds", caption)


def transport(data: dict[str, Any]) -> str:
    """Bytes a second between two processes on loopback, packed into one buffer and in scattered pieces."""
    rows = [(row["way"], ratio(row, "median_gb_s", "least_gb_s", "most_gb_s")) for row in data["rows"]]
    options = data["options"]
    pieces = f"{options['rows']} pieces of {options['row_bytes']} bytes"
    rounds = f"median (least-most) of {options['rounds']} rounds"
    return table(("way", "GB/s"), rows) + where(data["environment"], pieces, rounds, model="")


def faults(data: dict[str, Any]) -> str:
    """What every fault did to the requests under way, on each path."""
    keys = ("sent", "answered", "aborted", "failed", "lost", "wrong", "slowest_s", "recovered_s", "commit")
    rows = [(row["path"], f"{row['fault']} ({row['transport']})", *(row[key] for key in keys)) for row in data["rows"]]
    head = ("served", "fault", "sent", "answered", "hung up", "failed with a reason", "hung", "wrong text",
            "slowest, s", "serves again after, s", "commit")  # fmt: skip
    processors = ", ".join(sorted({row["cpu"] for row in data["rows"]}))
    spreads = [row["spread_nats"] for row in data["rows"] if row["spread_nats"] is not None]
    probe = [f"logprobs of the probe within {max(spreads):.0e} nats"] if spreads else []
    return table(head, rows) + where(
        data["environment"], "tiny random models", f"rows of {processors}", *probe, model=""
    )


def overlap(data: dict[str, Any]) -> str:
    """TTFT with chunks and with layers that leave when they are computed, for each link."""
    rows = [
        (
            row["model"], row["wire"], f"{row['chunks']} x {row['chunk_tokens']:,}", row["link"], row["forward_ms"],
            f"{row['by_chunk_s']:.3f}", f"{row['by_layer_s']:.3f}",
            f"{row['saving']:.0%}" + (f" ({row['least']:.0%}-{row['most']:.0%})" if row["driven"] else ""),
            f"{row['expected_saving']:.0%}", "yes" if row["driven"] else "no",
        )
        for row in data["rows"]
    ]  # fmt: skip
    head = ("model", "wire dtype", "chunks, tokens", "link", "forward pass, ms", "by chunk, s", "by layer, s",
            "saved (rounds)", "by arithmetic", "over the relay")  # fmt: skip
    share = f"compute is a wait at {data['options']['mfu']:.0%} of an H100's peak"
    return table(head, rows) + where(data["environment"], share, model="")


def smallchunks(data: dict[str, Any]) -> str:
    """A prompt in one chunk, in four, and in one whose layers leave by themselves: seconds of the same rows."""
    known = {
        tuple(row[key] for key in ("model", "wire", "link", "chunks", "chunk_tokens")): row for row in data["rows"]
    }
    rows = []
    for (*case, chunks, tokens), single in known.items():
        if chunks == 1 and (small := known.get((*case, 4, tokens // 4))) and single["saving"] >= 0.1:
            whole, four, layers = single["by_chunk_s"], small["by_chunk_s"], single["by_layer_s"]
            share = f"{(whole - four) / (whole - layers):.0%}"
            rows.append((*case, f"{tokens:,}", f"{whole:.3f}", f"{four:.3f}", f"{layers:.3f}", share))
    head = ("model", "wire dtype", "link", "prompt tokens", "one chunk, s", "four chunks, s", "one chunk by layer, s",
            "share of that saving with four chunks")  # fmt: skip
    return table(head, rows)


def agentic(data: dict[str, Any]) -> str:
    """As `conversation`, of the model whose context holds an agent's turns."""
    return conversation(data, "Qwen2.5-Coder-0.5B-Instruct")


def conversation(data: dict[str, Any], model: str = SMOLLM2) -> str:
    """Bytes and TTFT of each turn of a conversation, with decode's radix cache and without it."""
    several = data["options"]["rounds"] > 1
    rows = [
        (
            row["turn"], f"{row['prompt_tokens']:,}", f"{row['whole_bytes']:,}", f"{row['reuse_bytes']:,}",
            f"{row['whole_bytes'] / row['reuse_bytes']:.1f}x",
            f"{row['whole_ttft_ms']:,.0f}", f"{row['reuse_ttft_ms']:,.0f}",
            ratio(row, "ratio", "low", "high") if several else f"{row['ratio']:.2f}",
            f"{row['same_answers']} of {row['conversations']}",
        )
        for row in data["rows"]
    ]  # fmt: skip
    head = ("turn", "prompt tokens", "bytes, all rows", "bytes, with decode's cache", "fewer", "TTFT, all rows, ms",
            "TTFT with the cache, ms", "TTFT ratio" + " (95% interval)" * several, "same answers")  # fmt: skip
    options, count = data["options"], data["options"]["rounds"]
    over = f"means over {count} conversations, one at a time" if several else "one conversation"
    caption = (
        f"all rows in k4v3, computed in float32; {over}, over a link of {options['link']}; load average "
        f"{max(row['load_average'] for row in data['rows'])}"
    )
    return table(head, rows) + where(data["environment"], caption, model=model)


def bylayer(data: dict[str, Any] | None) -> str:
    """TTFT with rows sent by layer over TTFT without, beside the most that it could save."""
    if data is None:
        return "Not measured yet: `make bench-bylayer`."
    rows = [
        (
            row["wire"], f"{row['prompt_tokens']:,}", f"{row['ttft_ms']:,.0f}", f"{row['transfer_ms']:,.0f}",
            f"{row['layered_ttft_ms']:,.0f}", ratio(row, "ratio", "low", "high"), f"{row['predicted']:.2f}",
            f"{row['early_bytes'] / row['bytes']:.0%}",
        )
        for row in data["rows"]
    ]  # fmt: skip
    head = ("wire dtype", "prompt tokens, one chunk", "TTFT, ms", "of it transfer, ms", "TTFT by layer, ms",
            "ratio (95% interval)", "at best", "bytes that left early")  # fmt: skip
    options = data["options"]
    caption = (
        f"computed in float32; means over {options['rounds']} rounds of 2 requests, one at a time, over a link "
        f"of {options['link']}; at best: the shorter of transfer and all else costs no time; load average "
        f"{max(row['load_average'] for row in data['rows'])}"
    )
    return table(head, rows) + where(data["environment"], caption)


def simulation(data: dict[str, Any]) -> str:
    """Error of the simulation against the measured pair, by load."""
    rows = [r for r in data["rows"] if r.get("used")]
    figures = ("ttft_ms p50", "itl_ms p50", "itl_ms p90", "tpot_ms p90", "e2e_ms p50", "e2e_ms p90", "output tokens/s")
    body = [(r["load"], r["used"], *(f"{r['errors'][name]:+.0%}" for name in figures)) for r in rows]
    head = ("load", "used as", "TTFT p50", "ITL p50", "ITL p90", "TPOT p90", "E2E p50", "E2E p90", "output tokens/s")
    return table(head, body) + where(data["environment"], f"{data['options']['rounds']} rounds")


def served(data: dict[str, Any]) -> str:
    """Each wire dtype alone, served: bytes counted and planned, error and what is allowed."""
    rows = [
        (
            row["wire"], f"{row['counted']:,}", f"{row['planned']:,}", f"{row['error']:.1e}", f"{row['allowed']:.1e}",
            f"{row['controls_detected']} of {row['controls']}", "yes" if row["passed"] else "**no**", row["commit"],
        )
        for row in data["rows"]
    ]  # fmt: skip
    head = ("wire dtype", "bytes counted", "planned", "worst error, nats", "allowed", "wrong plans told apart",
            "passed", "commit")  # fmt: skip
    caption = f"{data['rows'][0]['prompts']} prompts of the fidelity check; pages of 16 tokens, chunks of 64"
    return table(head, rows) + where(data["environment"], "computed in float32", caption)
