"""Write the README's tables from benchmarks/results/*.json: between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.

.venv/build/bin/python tools/readme_tables.py                                   # what `make readme` runs
.venv/build/bin/python tools/readme_tables.py --demo out/demo/report/metrics.json   # keep a demo's figures first
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def where(environment: dict[str, Any], *more: str) -> str:
    """The line under a table: command, machine, versions, and what else chose the figures."""
    machine, versions = environment["machine"], environment["versions"]
    said = f"{machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}, no GPU"
    return f"\n\n`{environment['command']}` on {said}{''.join(f'; {part}' for part in more)}."


def _run(plan: dict[str, Any], stage: str) -> int:
    return plan["blocks"] - len(plan[f"{stage}_dropped"]) - plan.get(f"{stage}_pairs", 0)


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


def wire(data: dict[str, Any]) -> str:
    """Quality and bytes of the wire dtypes."""
    rows = [
        (row["wire_dtype"], f"{row['reduction']:.2f}x", f"{row['ratio']:.4f}", f"{row['kl']:.1e}")
        for row in data["rows"]
    ]
    head = ("wire dtype, all rows of all layers", "bytes against bfloat16", "perplexity ratio", "KL, nats")
    return table(head, rows) + where(data["environment"], f"seed {data['options']['seed']}")


def pack(data: dict[str, Any]) -> str:
    """Speed of pack and unpack beside memcpy."""
    steps = {(r["shape"], r["slots"], r["wire_dtype"], r["step"]): r["of_memcpy"] for r in data["rows"]}
    rows = []
    largest = list(steps)[-1][0]  # the other shapes are in the file
    for shape, slots, dtype in dict.fromkeys(key[:3] for key in steps if key[2] != "memcpy" and key[0] == largest):
        shown = [steps[shape, slots, dtype, step] for step in ("pack", "unpack")]
        rows.append((shape, slots, dtype, *(f"{s['median']:.2f} ({s['least']:.2f}-{s['most']:.2f})" for s in shown)))
    head = ("KV pool", "slots", "wire dtype", "pack / memcpy", "unpack / memcpy")
    return table(head, rows) + where(data["environment"], "median (least-most) over interleaved rounds")


def engines(data: dict[str, Any]) -> str:
    """Engines in SGLang's workers beside its torch model, and what the attention callback costs."""
    rows = []
    for row in (row for row in data["rows"] if "concurrency" in row):
        ratios = [row[key] for key in ("ttft_ratio", "itl_ratio")]
        rows.append((row["concurrency"], *(f"{r['median']:.2f} ({r['least']:.2f}-{r['most']:.2f})" for r in ratios)))
    calls = [row for row in data["rows"] if "outside_us" in row]
    said = "; ".join(f"{row['stage']}, {row['tokens']} tokens: {row['outside_us']:.0f} us" for row in calls)
    shares = f"{min(row['share'] for row in calls):.1%} to {max(row['share'] for row in calls):.1%} of the graph's time"
    head = ("requests at once", "TTFT, onnxruntime / torch", "ITL, onnxruntime / torch")
    tail = f"\n\nThe attention callback costs, a layer and outside of the attention itself: {said} ({shares})."
    rounds = (
        f"median (least-most) of {data['options']['rounds']} interleaved rounds, {data['options']['prompt']} tokens in"
    )
    return table(head, rows) + tail + where(data["environment"], rounds, f"{data['options']['output']} out")


def kv(data: dict[str, Any]) -> str:
    """Quality of every KV rule at every reduction; methods with several seeds as their mean."""
    groups = dict[tuple[float, str], list[dict[str, Any]]]()
    for row in data["rows"]:
        groups.setdefault((row["asked"] or 0.0, row["method"]), []).append(row)
    rows = []
    for (asked, method), found in sorted(groups.items(), key=lambda item: item[0][0]):
        keys = ("reduction", "ppl_ratio", "ppl_ratio_stderr", "choice", "needle", "agreement")
        reduction, ratio, stderr, *shares = (fmean(row[key] for row in found) for key in keys)
        seeds = f" ({len(found)} seeds)" if len(found) > 1 else ""
        name = f"**{method}**" if method.startswith("ours") else method
        spread = f" ± {stderr:.3f}" if stderr else ""
        cells = (f"{share:.0%}" for share in shares)
        rows.append((f"{asked:g}x" if asked else f"{reduction:.2f}x", name + seeds, f"{ratio:.3f}{spread}", *cells))
    asked = data["options"]
    head = ("reduction", "rule", "perplexity ratio", "choice", "needle", "agreement")
    return table(head, rows) + where(
        data["environment"],
        f"{asked['sequences']} continuations, {asked['questions']} questions of Social IQa, {10 * asked['needles']} "
        f"needles, all behind {asked['prompt']}-token prompts; ± is the paired standard error; seed {asked['seed']}",
    )


def pruning(data: dict[str, Any]) -> str:
    """Every method at every number of blocks; those with several seeds as mean and spread. Trained ones stand last."""
    groups = dict[tuple[int, bool, str], list[dict[str, Any]]]()
    for row in data["rows"]:
        groups.setdefault((row["removed"], row["trained"], row["method"]), []).append(row)
    rows = []
    for (removed, trained, method), found in sorted(groups.items(), key=lambda item: item[0][:2]):
        cells = [_spread([row[f"{corpus}_ppl"] for row in found]) for corpus in ("brown", "austen")]
        unified = [row["unified_ppl"] for row in found if row.get("unified_ppl")]
        cells += [_spread(unified) if unified else "", f"{fmean(row['choice'] for row in found):.0%}"]
        searched = [row for row in found if row.get("block_forwards")]
        cells.append(f"{fmean(row['block_forwards'] for row in searched):,.0f}" if searched else "")
        name = f"**{method}**" if method.startswith("ours") else method
        rows.append((removed or "", name + (", trained" if trained else ""), *cells))
    asked = data["options"]
    head = ("removed", "method", "Brown", "Austen", "Brown, one model", "choice", "block-forwards")
    return table(head, rows) + where(
        data["environment"],
        f"PD perplexity of {asked['sequences']} x {asked['continuation']} tokens after {asked['prompt']} of prompt, "
        f"prefill loses a third as many, chosen on {asked['calibration']} x {asked['length']} tokens of Brown's "
        f"calibration split; {asked['questions']} questions of Social IQa; ± is half the range of the seeds",
    )


def _spread(values: list[float]) -> str:
    """Mean, and half the range where there are several."""
    half = (max(values) - min(values)) / 2
    return f"{fmean(values):.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo": demo,
    "kv": kv,
    "pruning": pruning,
    "engines": engines,
    "wire": wire,
    "pack": pack,
}


def main() -> None:
    """Rewrite the README in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="metrics.json to keep as benchmarks/results/demo.json")
    asked = parser.parse_args()
    if asked.demo:
        shutil.copy(asked.demo, RESULTS / "demo.json")
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, render in TABLES.items():
        source = RESULTS / f"{name}.json"
        if source.exists() and f"<!-- {name}:begin -->" in text:
            before, _, rest = text.partition(f"<!-- {name}:begin -->\n")
            _, end, after = rest.partition(f"<!-- {name}:end -->")
            text = f"{before}<!-- {name}:begin -->\n{render(json.loads(source.read_text()))}\n{end}{after}"
    readme.write_text(text)


if __name__ == "__main__":
    main()
