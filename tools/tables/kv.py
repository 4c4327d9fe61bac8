"""KV: rules, wire dtypes, packing, choice."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from tables.base import ratio, table, where


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


def wire(data: dict[str, Any]) -> str:
    """Quality and bytes of the wire dtypes, keys whole and less their offsets."""
    found = {(row["model"], row["wire"], row["key_offsets"]): row for row in data["rows"]}
    rows = []
    for model, wire in dict.fromkeys(key[:2] for key in found):
        whole = found[model, wire, False]
        shown = [
            text
            for row in (whole, found.get((model, wire, True), whole))
            for text in (f"{row['ratio']:.4f} ± {row['error']:.4f}", f"{row['kl']:.1e}")
        ]
        rows.append((model, wire, f"{whole['reduction']:.2f}x", *shown))
    head = (
        "model", "wire dtype, all rows of all layers", "bytes against bfloat16", "perplexity ratio, keys whole",
        "KL, nats", "perplexity ratio, keys less their offsets", "KL, nats",
    )  # fmt: skip
    said = "{sequences} x {continuation} tokens of Brown's {split} split after {prompt} of prompt; ± is the paired "
    return table(head, rows) + where(
        data["environment"], (said + "standard error; seed {seed}").format(**data["options"])
    )


def pack(data: dict[str, Any]) -> str:
    """Speed of pack and unpack beside memcpy."""
    steps = {(r["shape"], r["slots"], r["wire_dtype"], r["step"]): r["of_memcpy"] for r in data["rows"]}
    rows = []
    largest = list(steps)[-1][0]  # the other shapes are in the file
    for shape, slots, dtype in dict.fromkeys(key[:3] for key in steps if key[2] != "memcpy" and key[0] == largest):
        shown = [steps[shape, slots, dtype, step] for step in ("pack", "unpack")]
        rows.append((shape, slots, dtype, *map(ratio, shown)))
    head = ("KV pool", "slots", "wire dtype", "pack / memcpy", "unpack / memcpy")
    return table(head, rows) + where(data["environment"], "median (least-most) over interleaved rounds")


def choice(data: dict[str, Any]) -> str:
    """Accuracy on all questions, beside StreamingLLM's."""
    rows = []
    for row in data["rows"]:
        beside = row["accuracy_norm against StreamingLLM at 4.95x"]
        against = "" if row["method"] == "StreamingLLM" else f"{beside['mean']:+.1%} ± {beside['stderr']:.1%}"
        cells = (f"{row['reduction']:.2f}x", row["method"], f"{row['accuracy_norm']:.1%}", against)
        rows.append((*cells, f"{row['right_nll']:.3f}"))
    head = ("reduction", "rule", "choice", "against StreamingLLM at 4.95x", "nats a token of the right answer")
    questions, asked = data["rows"][0]["questions"], data["options"]
    said = f"all {questions:,} questions behind {asked['prompt']}-token prompts; ± is the paired standard error"
    return table(head, rows) + where(data["environment"], said, f"seed {asked['seed']}")
