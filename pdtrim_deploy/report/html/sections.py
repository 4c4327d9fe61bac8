"""The page's first and last sections, each from what there is; None where there is nothing to show."""

from __future__ import annotations

from pdtrim_deploy.report.html.collect import Findings
from pdtrim_deploy.report.html.fault_table import fault_table
from pdtrim_deploy.report.html.footing import built, loads_of, made, seed_of
from pdtrim_deploy.report.html.markup import Markup, join, table, tag
from pdtrim_deploy.report.html.plan_picture import plan_picture


def headline(found: Findings) -> Markup:
    """The few figures that people quote, each with what it is of."""
    plan, tokens = found.bundle.plan, found.bundle.recipe.evaluation.prompt_tokens
    cards = [
        (f"{plan.reduction(tokens):.2f}x", f"fewer KV bytes a request, at {tokens} prompt tokens"),
        (
            f"{len(plan.prefill_layers)} + {len(plan.decode_layers)}",
            f"of {plan.model.num_blocks} blocks run in prefill + decode",
        ),
    ]
    if judged := found.reports.get("eval"):
        cards.append((f"x{judged['ratio']:.3f}", f"perplexity, on {judged['tokens']:,} held-out tokens"))
    for name, said in loads_of(found).items():
        itl = next((one for one in said["ratios"] if one["figure"] == "ITL p50"), None)
        if itl and not itl["low"] <= 1 <= itl["high"]:  # noise is no headline
            cards.append((f"x{itl['ratio']:.2f}", f"ITL p50 (95%: {itl['low']:.2f} - {itl['high']:.2f}), {name}"))
    return tag("div", *(tag("div", tag("b", value), tag("span", text)) for value, text in cards), class_="cards")


def plan(found: Findings) -> Markup:
    """Block by block."""
    chosen, tokens = found.bundle.plan, found.bundle.recipe.evaluation.prompt_tokens
    said = (
        f"{chosen.payload_bytes(tokens):,} bytes travel for a prompt of {tokens} tokens, dense would be "
        f"{chosen.dense_bytes(tokens):,}. Chosen by {found.bundle.recipe.pruning.method} (blocks) and "
        f"{found.bundle.recipe.kv.method} (KV)."
    )
    return join([tag("p", said), plan_picture(chosen, tokens), built(found)])


def engines(found: Findings) -> Markup | None:
    """What was built and what has run where."""
    made = found.bundle.engines
    if not made and not found.bundle.manifest.failures:
        return None
    rows = [
        (
            f"{engine.target} {engine.stage}", engine.dtype, f"{engine.size / 1e6:,.1f} MB", engine.state,
            f"{engine.numerics.hidden_error:.1e}" if engine.numerics else "-", engine.run or "nowhere",
        )
        for engine in made.values()
    ]  # fmt: skip
    parts = [table(("engine", "dtype", "size", "state", "worst relative error of the graph", "has run on"), rows)]
    limits = dict.fromkeys(f"{engine.target}: {limit}" for engine in made.values() for limit in engine.limits)
    parts.append(tag("ul", *(tag("li", limit) for limit in limits)) if limits else Markup(""))
    parts += [
        tag("p", tag("strong", f"not built, {name}: "), why) for name, why in found.bundle.manifest.failures.items()
    ]
    return join([*parts, built(found)])


def faults(found: Findings) -> Markup | None:
    """What was done to a running pair, and what it did to requests."""
    if found.faults is None:
        return None
    return join([fault_table(found.faults), made(found.faults, seed_of(found.faults))])


def origin(found: Findings) -> Markup:
    """Environment, seeds, commands, and what this page lacks."""
    manifest = found.bundle.manifest
    rows = [
        ("bundle", found.bundle.path),
        ("model", f"{found.bundle.recipe.model.source}, {found.bundle.recipe.model.dtype}"),
        ("plan", manifest.plan_digest),
        ("recipe", manifest.recipe_digest),
        ("seed of the build", manifest.seed),
        ("by", tag("code", found.built["environment"]["command"])),
        ("on", ", ".join(f"{what} {value}" for what, value in manifest.machine.items()) or "a machine not recorded"),
        *((f"step {name}", f"{step.seconds:.1f} s") for name, step in manifest.steps.items()),
        *manifest.versions.items(),
    ]
    lacks = [tag("li", f"{name}: ", tag("code", command)) for name, command in found.missing.items()]
    absent = (
        [tag("p", "Not on this page, and the command that would put it there:"), tag("ul", *lacks)] if lacks else []
    )
    return join([table(("built", ""), rows), *absent])
