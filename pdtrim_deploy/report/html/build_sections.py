"""Sections about the build: the search, healing, and the attention of decode."""

from __future__ import annotations

from typing import Any

from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.pruning.solution import Solution
from pdtrim_deploy.report.html import charts
from pdtrim_deploy.report.html.collect import Findings
from pdtrim_deploy.report.html.footing import built, number
from pdtrim_deploy.report.html.markup import Markup, join, table, tag
from pdtrim_deploy.report.html.model_pictures import attention_picture, redundancy_picture


def target(findings: Findings) -> Markup | None:
    """What was to be reached by one budget, and what is."""
    report = findings.reports.get("target")
    if report is None:
        return None
    labels = {
        "ttft": "prefill's time, share of the whole model's", "itl": "a decode step's time, share",
        "kv": "dense over planned KV bytes", "loss": "perplexity, ratio, by measured KL before healing",
    }  # fmt: skip
    rows = [
        (label, *(number(report[column].get(name), 3) for column in ("target", "taken", "reached")))
        for name, label in labels.items()
    ]
    at, kl = report["counted_at"], report["kl"]
    requests = f"{at['batch']} request{'s' * (at['batch'] > 1)}"
    text = (
        f"Times are {at['times']}, for prompts of {at['isl']} tokens and {requests} "
        f"in a decode step. KL of the choice: {kl['predicted']:.4f} nats a token predicted, {kl['measured']:.4f} "
        "measured."
    )
    parts = [table(("what", "target", "taken", "reached"), rows), tag("p", text)]
    if report["sentence"]:
        parts.append(tag("p", report["sentence"]))
    counts = [
        (kind["prefill"].replace("_", " "), kind["decode"].replace("_", " "), kind["count"])
        for kind in report["blocks"]
    ]
    return join([*parts, table(("prefill", "decode", "blocks"), counts), built(findings)])


def search(findings: Findings) -> Markup | None:
    """How the blocks were chosen."""
    parts = []
    if candidates := findings.reports.get("candidates"):
        gone: dict[str, tuple[int, ...]] = {stage: findings.bundle.plan.dropped(stage) for stage in STAGES}
        report = (
            "Cosine between the input and output of a block, on calibration text: near 1 the block changes little. A "
            "search starts from it, but decides by the loss."
        )
        parts += [tag("p", report), redundancy_picture(candidates["redundancy"], candidates["pair_redundancy"], gone)]
    for stage, report in findings.reports.get("pruning", {}).items():
        steps = report.get("trajectory", ())
        if not steps:
            continue
        known = [(_unit(step), step["loss"]) for step in steps if step.get("loss") is not None]
        parts.append(tag("h3", f"{stage}: removes {Solution.parse(report).label}"))
        if len(known) > 1:
            parts.append(charts.trajectory(known, f"calibration loss while {stage} loses blocks"))
        parts.append(
            table(
                ("step", "removed", "calibration loss, nats", "seconds"),
                [(s["step"], _unit(s), number(s.get("loss"), 4), number(s.get("seconds"), 2)) for s in steps],
            )
        )
        if ranked := report.get("finalists"):
            parts += _ranking(ranked)
    return (
        join([*parts, built(findings, f"seed of the search {findings.bundle.recipe.pruning.seed}")]) if parts else None
    )


def mended(findings: Findings) -> Markup | None:
    """Changes to the weights of the remaining blocks."""
    reports, rows = findings.reports, list[tuple[str, ...]]()
    for pair, lesson in reports.get("healing", {}).get("students", {}).items():
        errors = (number(lesson["error_drop"], 4), number(lesson["error"], 4))
        rows.append((f"student of blocks {pair}", "relative squared error, against dropping the pair", *errors, "yes"))
    for stage, result in reports.get("healing", {}).get("rescaled", {}).items():
        verdict = "yes" if result["kept"] else "no: not better"
        losses = (number(result["before"], 4), number(result["after"], 4))
        rows.append((f"{stage}, rescaled", "loss, nats a token, on text not fitted", *losses, verdict))
    known = "KL from the dense model, nats a token, on calibration text that no gradient saw"
    healed = {f"{stage}, distilled": result for stage, result in reports.get("healing", {}).get("healing", {}).items()}
    if "healing-kv" in reports:
        healed["decode, distilled on the KV that it receives"] = reports["healing-kv"]
    for what, result in healed.items():
        verdict = "yes" if result["kept"] else "no: not clearly better"
        verdict += f"; difference {result['difference']:+.4f} ± {result['stderr']:.4f}"
        rows.append(
            (
                f"{what}, {result['steps']} steps",
                known,
                number(result["before"], 4),
                number(result["after"], 4),
                verdict,
            )
        )
    compensation = f"Compensation: {findings.bundle.recipe.healing.compensation}."
    if not rows:
        return join([tag("p", compensation), built(findings)]) if "healing" in reports else None
    return join([tag("p", compensation), table(("what", "measure", "before", "after", "kept"), rows), built(findings)])


def attention(findings: Findings) -> Markup | None:
    """The parts of the prompt that decode attends to."""
    mass = findings.reports.get("attention")
    if mass is None:
        return None
    text = (
        f"Attention of generated tokens, on {mass['sequences']} calibration texts with {mass['prompt_tokens']} prompt "
        f"tokens: shares on a prompt's first {mass['n_first']} and last {mass['n_last']} tokens, on those in the "
        "middle, and on generated tokens. A layer may attend to the middle and still lose little without it: the plan "
        "is chosen by the measured loss."
    )
    return join([tag("p", text), attention_picture(mass), built(findings)])


def _ranking(finalists: list[dict[str, Any]]) -> list[Markup]:
    """The judged losses of a stage's finalists."""
    shown, decides = {"as the search saw it": "loss", "compensated": "compensated"}, "which decides"
    if any("decode_behind" in finalist for finalist in finalists):
        shown, decides = (
            shown | {"decode behind it": "decode_behind"},
            "and the smaller loss of decode behind it decides",
        )
    rows = [
        (Solution.parse(finalist).label, *(number(finalist.get(key), 4) for key in shown.values()))
        for finalist in finalists
    ]
    text = tag("p", f"Judged again once compensated, {decides}; nats a token:")
    return [text, table(("loses", *shown), rows)]


def _unit(step: dict[str, Any]) -> str:
    """What a step of the search removed: a block, or a sublayer of one."""
    sublayer = step.get("sublayer", "block").replace("mlp", "MLP")
    return f"{sublayer} {step['block']}"
