"""KV: rules, prompt lengths, wire dtypes, packing, choice."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from tables.base import ratio, table, weights, where

LENGTHS = ("128", "512", "2048")


def named(method: str) -> str:
    """A rule as the tables call it: `dense k4v3` is a rule too, of one dtype for all rows."""
    name = method.replace("dense ", "uniform ") + (", all rows" if method.startswith("dense ") else "")
    return f"**{name.replace('ours', 'budget plan')}**" if method.startswith("ours") else name


def _groups(data: dict[str, Any]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(reduction, rule, its rows: one for each seed), by reduction."""
    groups = dict[tuple[float, str], list[dict[str, Any]]]()
    for row in data["rows"]:
        groups.setdefault((row["asked"] or row["reduction"], row["method"]), []).append(row)
    return [
        (f"{size:g}x" if rows[0]["asked"] else f"{size:.2f}x", named(method), rows)
        for (size, method), rows in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def kv(data: dict[str, Any]) -> str:
    """Quality of every KV rule at every reduction; rules with several seeds as their mean."""
    lines = []
    for size, name, rows in _groups(data):
        keys = ("ppl_ratio", "ppl_ratio_stderr", "needle", "agreement", "agreement_prefix")
        loss, stderr, *shares = (fmean(row[key] for row in rows) for key in keys)
        seeds = f" ({len(rows)} seeds)" if len(rows) > 1 else ""
        spread = f" ± {stderr:.3f}" if stderr else ""
        lines.append((size, name + seeds, f"{loss:.3f}{spread}", *(f"{share:.0%}" for share in shares)))
    options = data["options"]
    head = ("reduction", "rule", "perplexity ratio", "needle", "agreement", "same greedy text")
    return table(head, lines) + where(
        data["environment"],
        "computed in float32, bytes against a bfloat16 pool",
        f"{options['sequences']} continuations of 64 tokens and {10 * options['needles']} needles after "
        f"{options['prompt']}-token prompts",
        f"± is the standard error of the paired ratio to dense; seed {options['seed']}",
    )


def kvlengths(data: dict[str, Any]) -> str:
    """What the plans made for one prompt length do at others: reduction and perplexity ratio."""
    lines = [
        (size, name, *(_at(rows, tokens) for tokens in LENGTHS))
        for size, name, rows in _groups(data)
        if rows[0]["method"] != "dense"
    ]
    head = ("planned reduction", "rule", *(f"{int(tokens):,} tokens" for tokens in LENGTHS))
    return table(head, lines) + where(
        data["environment"],
        "in each cell bytes saved and perplexity ratio, both against dense",
        f"plans were made for {data['options']['prompt']} tokens",
    )


def _at(rows: list[dict[str, Any]], tokens: str) -> str:
    saved, loss = (fmean(row[f"{key}_by_prompt"][tokens] for row in rows) for key in ("reduction", "ppl_ratio"))
    return f"{saved:.1f}x, {loss:.3f}"


FORMS = {"whole": "unchanged", "less mean": "minus their mean", "scaled": "minus their mean and scaled"}


def uniform(rows: list[dict[str, Any]], dtype: str) -> dict[str, dict[str, Any]]:
    """bench-wire's row of a wire dtype by model, of Brown, with all that key offsets do to keys."""
    of_dtype = [row for row in rows if row["wire"] == dtype and _text(row) == "brown"]
    return {row["model"]: row for row in sorted(of_dtype, key=lambda row: list(FORMS).index(_keys(row)))}


def wire(data: dict[str, Any]) -> str:
    """Quality and bytes of the wire dtypes by model and text, keys in each form that was measured."""
    rows, options = data["rows"], data["options"]
    by_form = {(row["model"], _text(row), row["wire"], _keys(row)): row for row in rows}
    forms = [form for form in FORMS if any(key[-1] == form for key in by_form)]
    scaled, lines = forms[-1] == "scaled", []
    for key in dict.fromkeys(key[:3] for key in by_form):
        plain = by_form[*key, "whole"]
        shown = [by_form.get((*key, form), plain) for form in forms]
        change = [_change(shown[-1])] if scaled else []
        lines.append((*key, f"{plain['reduction']:.2f}x", *map(_loss, shown), *change))
    models, texts = (dict.fromkeys(key[at] for key in by_form) for at in range(2))
    return table(
        (
            "model", "text", "wire dtype, all rows", "bytes against bfloat16",
            *(f"keys {FORMS[form]}: perplexity ratio, KL" for form in forms), *["KL, change by scales"] * scaled,
        ),
        lines,
    ) + where(
        data["environment"], *map(weights, models),
        f"{options['sequences']} x {options['continuation']} tokens of the {options['split']} split of each text "
        f"({', '.join(texts)}) after {options['prompt']}-token prompts",
        "KL in nats", "± is the paired standard error", f"seed {options['seed']}", model="",
    )  # fmt: skip


def _text(row: dict[str, Any]) -> str:
    """Before there was a choice all was Brown."""
    return str(row.get("corpus", "brown"))


def _keys(row: dict[str, Any]) -> str:
    """Before there were key scales, keys had offsets or not."""
    return str(row["keys"] if "keys" in row else list(FORMS)[row["key_offsets"]])


def _loss(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.4f} ± {row['error']:.4f}, {row['kl']:.1e}"


def _change(row: dict[str, Any]) -> str:
    return f"{row['kl_change']:+.1e} ± {row['kl_change_error']:.1e}" if "kl_change" in row else ""


def pack(data: dict[str, Any]) -> str:
    """Speed of pack and unpack beside memcpy."""
    steps = {(r["shape"], r["slots"], r["wire_dtype"], r["step"]): r["of_memcpy"] for r in data["rows"]}
    rows = []
    largest = list(steps)[-1][0]  # the other shapes are in the file
    for shape, slots, dtype in dict.fromkeys(key[:3] for key in steps if key[2] != "memcpy" and key[0] == largest):
        shown = [steps[shape, slots, dtype, step] for step in ("pack", "unpack")]
        rows.append((shape, slots, dtype, *map(ratio, shown)))
    head = ("KV pool", "slots", "wire dtype", "pack / memcpy", "unpack / memcpy")
    return table(head, rows) + where(data["environment"], "median (least-most) over interleaved rounds", model="")


def launches(data: dict[str, Any]) -> str:
    """Launches of a chunk in both forms on a GPU."""
    by_form = {(row["plan"], row["wire"], row["form"]): row for row in data["rows"]}
    rows = []
    for plan, wire in dict.fromkeys(key[:2] for key in by_form):
        before, after = (by_form[plan, wire, form] for form in ("torch", "triton"))
        counts = ("pack_launches", "unpack_launches", "pack_copies", "unpack_copies", "syncs")
        rows.append((plan, wire, *(f"{before[count]:,} -> {after[count]}" for count in counts)))
    head = ("plan", "wire dtype", "launches of pack", "of unpack", "copies at pack", "at unpack", "waits for the GPU")
    chunk = "a new chunk of 512 tokens of Llama-3.1-8B, keys minus their offsets; torch's own operations -> Triton"
    return table(head, rows) + where(data["environment"], chunk, "counted on meta tensors", model="")


def choice(data: dict[str, Any]) -> str:
    """Both accuracies and the loss of the right answer on all questions, paired with dense."""
    rows = [
        (
            f"{row['reduction']:.2f}x",
            named(row["method"]) if row["method"] != "dense" else "dense",
            f"{row['accuracy_norm']:.1%}",
            *(_paired(row, name, form) for name, form in (("accuracy_norm", "+.1%"), ("accuracy", "+.1%"))),
            f"{row['right_nll']:.3f}",
            _paired(row, "right_nll", "+.3f"),
        )
        for row in data["rows"]
    ]
    head = ("reduction", "rule", "choice", "... against dense", "not normalised, against dense",
            "nats a token of the right answer", "... against dense")  # fmt: skip
    questions, options = data["rows"][0]["questions"], data["options"]
    caption = f"all {questions:,} questions after {options['prompt']}-token prompts, 3 answers each: chance is 33%"
    paired = f"± is the standard error of the paired difference; seed {options['seed']}"
    return table(head, rows) + where(data["environment"], caption, paired)


def _paired(row: dict[str, Any], name: str, form: str) -> str:
    beside = row[f"{name} against dense"]
    return "" if row["method"] == "dense" else f"{beside['mean']:{form}} ± {beside['stderr']:{form[1:]}}"
