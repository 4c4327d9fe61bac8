"""The page's first and last sections; None if the bundle has no data for one."""

from __future__ import annotations

import json

from pdtrim_deploy.models.expert_savings import experts_sentence
from pdtrim_deploy.models.quantized import stored_weights
from pdtrim_deploy.report.html.collect import Findings
from pdtrim_deploy.report.html.fault_table import fault_table
from pdtrim_deploy.report.html.footing import built, loads_of, provenance, seed_of
from pdtrim_deploy.report.html.markup import Markup, join, table, tag
from pdtrim_deploy.report.html.plan_picture import plan_picture


def headline(findings: Findings) -> Markup:
    """The main figures, each with its subject."""
    plan, tokens = findings.bundle.plan, findings.bundle.recipe.evaluation.prompt_tokens
    sent = [
        (
            f"{plan.reduction(tokens, 'native'):.2f}x",
            f"fewer KV bytes a request than from a {plan.model.kv_dtype} pool "
            f"({plan.reduction(tokens, 'fp8_e4m3'):.2f}x than from one of fp8), at {tokens} prompt tokens",
        )
    ]
    layers = len(plan.prefill_layers), len(plan.decode_layers)
    cards = [
        *([] if plan.unified else sent),
        (
            str(layers[0]) if plan.unified else f"{layers[0]} + {layers[1]}",
            f"of {plan.model.num_blocks} blocks run in {'one model' if plan.unified else 'prefill + decode'}",
        ),
    ]
    if judged := findings.reports.get("eval"):
        cards.append((f"x{judged['ratio']:.3f}", f"perplexity, on {judged['tokens']:,} held-out tokens"))
    for name, comparison in loads_of(findings).items():
        itl = next((ratio for ratio in comparison["ratios"] if ratio["figure"] == "ITL p50"), None)
        if itl and not itl["low"] <= 1 <= itl["high"]:  # only intervals that exclude 1
            cards.append((f"x{itl['ratio']:.2f}", f"ITL p50 (95%: {itl['low']:.2f} - {itl['high']:.2f}), {name}"))
    return tag("div", *(tag("div", tag("b", value), tag("span", text)) for value, text in cards), class_="cards")


def plan(findings: Findings) -> Markup:
    """The plan, block by block."""
    chosen, tokens = findings.bundle.plan, findings.bundle.recipe.evaluation.prompt_tokens
    text = (
        f"{chosen.payload_bytes(tokens):,} bytes travel for a prompt of {tokens} tokens, "
        f"{chosen.reductions(tokens)}. Chosen by {findings.bundle.recipe.pruning.method} (blocks) and "
        f"{findings.bundle.recipe.kv.method} (KV)."
    )
    if chosen.unified:
        text = f"One model for both stages: no KV travels. Blocks chosen by {findings.bundle.recipe.pruning.method}."
    more = []
    if chosen.experts is not None:
        stage = findings.bundle.decode_dir
        config, quantised = json.loads((stage / "config.json").read_text()), stored_weights(stage) is not None
        experts = experts_sentence(chosen, config, quantised=quantised) or ""
        more.append(tag("p", f"{experts[:1].upper()}{experts[1:]}."))
    return join([tag("p", text), *more, plan_picture(chosen, tokens), built(findings)])


def engines(findings: Findings) -> Markup | None:
    """The built engines, and where each has run."""
    built_engines = findings.bundle.engines
    if not built_engines and not findings.bundle.manifest.failures:
        return None
    rows = [
        (
            f"{engine.target} {engine.stage}", engine.dtype, f"{engine.size / 1e6:,.1f} MB", engine.state,
            f"{engine.numerics.hidden_error:.1e}" if engine.numerics else "-", engine.run or "nowhere",
        )
        for engine in built_engines.values()
    ]  # fmt: skip
    parts = [table(("engine", "dtype", "size", "state", "worst relative error of the graph", "has run on"), rows)]
    limits = dict.fromkeys(f"{engine.target}: {limit}" for engine in built_engines.values() for limit in engine.limits)
    parts.append(tag("ul", *(tag("li", limit) for limit in limits)) if limits else Markup(""))
    parts += [
        tag("p", tag("strong", f"not built, {name}: "), why) for name, why in findings.bundle.manifest.failures.items()
    ]
    return join([*parts, built(findings)])


def faults(findings: Findings) -> Markup | None:
    """Faults on a running pair, and the results of its requests."""
    if findings.faults is None:
        return None
    return join([fault_table(findings.faults), provenance(findings.faults, seed_of(findings.faults))])


def origin(findings: Findings) -> Markup:
    """Environment, seeds, commands, and missing reports."""
    manifest = findings.bundle.manifest
    rows = [
        ("bundle", findings.bundle.path),
        ("model", f"{findings.bundle.recipe.model.source}, {findings.bundle.recipe.model.dtype}"),
        ("plan", manifest.plan_digest),
        ("recipe", manifest.recipe_digest),
        ("seed of the build", manifest.seed),
        ("by", tag("code", findings.built["environment"]["command"])),
        ("on", ", ".join(f"{what} {value}" for what, value in manifest.machine.items()) or "a machine not recorded"),
        *((f"step {name}", f"{step.seconds:.1f} s") for name, step in manifest.steps.items()),
        *manifest.versions.items(),
    ]
    lacks = [tag("li", f"{name}: ", tag("code", command)) for name, command in findings.missing.items()]
    absent = (
        [tag("p", "Not on this page, and the command that would put it there:"), tag("ul", *lacks)] if lacks else []
    )
    return join([table(("built", ""), rows), *absent])
