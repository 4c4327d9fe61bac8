"""The page's sections, each from what there is; None where there is nothing to show."""

from __future__ import annotations

import math
from typing import Any

from pdtrim_deploy.plan import STAGES
from pdtrim_deploy.report.html import charts
from pdtrim_deploy.report.html.collect import Findings
from pdtrim_deploy.report.html.fault_table import fault_table
from pdtrim_deploy.report.html.markup import Markup, join, table, tag
from pdtrim_deploy.report.html.model_pictures import attention_picture, redundancy_picture
from pdtrim_deploy.report.html.plan_picture import plan_picture
from pdtrim_deploy.report.workers_table import goal_text, workers_rows
from pdtrim_deploy.simulation import SizedSide
from pdtrim_deploy.sizing import Link


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
    for name, said in _loads(found).items():
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
    return join([tag("p", said), plan_picture(chosen, tokens), _built(found)])


def search(found: Findings) -> Markup | None:
    """How the blocks were chosen."""
    parts = []
    if could := found.reports.get("candidates"):
        gone: dict[str, tuple[int, ...]] = {stage: found.bundle.plan.dropped(stage) for stage in STAGES}
        said = (
            "Cosine between what goes into a block and what comes out, on calibration text: near 1 a block changes "
            "little. It is where a search begins, not what it goes by: that is the loss."
        )
        parts += [tag("p", said), redundancy_picture(could["redundancy"], could["pair_redundancy"], gone)]
    for stage, said in found.reports.get("pruning", {}).items():
        steps = said.get("trajectory", ())
        if not steps:
            continue
        known = [(step["block"], step["loss"]) for step in steps if step.get("loss") is not None]
        parts.append(tag("h3", f"{stage}: removes {', '.join(map(str, said['removed']))}"))
        if known:
            parts.append(charts.trajectory(known, f"calibration loss while {stage} loses blocks"))
        parts.append(
            table(
                ("step", "block removed", "calibration loss, nats", "seconds"),
                [(s["step"], s["block"], _number(s.get("loss"), 4), _number(s.get("seconds"), 2)) for s in steps],
            )
        )
    return join([*parts, _built(found, f"seed of the search {found.bundle.recipe.pruning.seed}")]) if parts else None


def attention(found: Findings) -> Markup | None:
    """Where decode looks in the prompt."""
    mass = found.reports.get("attention")
    if mass is None:
        return None
    said = (
        f"Of generated tokens, on {mass['sequences']} calibration texts with {mass['prompt_tokens']} prompt tokens: "
        f"the share of attention on a prompt's first {mass['n_first']} and last {mass['n_last']} tokens, on those in "
        "the middle, and on what was generated. A layer that looks at the middle need not be harmed by its loss: what "
        "a layer's KV is worth was measured."
    )
    return join([tag("p", said), attention_picture(mass), _built(found)])


def quality(found: Findings) -> Markup | None:
    """What the savings cost."""
    parts, tokens = [], found.bundle.recipe.evaluation.prompt_tokens
    if judged := found.reports.get("eval"):
        rows = [
            ("dense", "1.00x", f"{judged['dense']['ppl']:.3f}", "1"),
            (
                "this bundle",
                f"{found.bundle.plan.reduction(tokens):.2f}x",
                f"{judged['pd']['ppl']:.3f}",
                f"{judged['ratio']:.4f}",
            ),
        ]
        parts.append(table(("", "fewer KV bytes", "perplexity", "ratio"), rows))
        parts.append(_made(judged, f"seed {judged['text']['seed']}", f"corpus {judged['text']['corpus']}"))
    if tasks := found.reports.get("tasks"):
        figures = [
            (
                f"{task['task']}: {one['measure']}" + (f", {one['group']}" if one["group"] else ""), one["items"],
                f"{one['dense']:.4f}", f"{one['pd']:.4f}",
                f"{one['difference']:+.4f}" + (f" ± {one['stderr']:.4f}" if one["stderr"] is not None else ""),
            )
            for task in tasks["tasks"] for one in task["figures"]
        ]  # fmt: skip
        parts.append(table(("task", "items", "dense", "this bundle", "difference ± standard error"), figures))
        parts.append(_made(tasks, f"seed {tasks['seed']}", f"corpus {tasks['corpus']}"))
    if check := found.reports.get("fidelity"):
        detected = (
            f"{check['controls_detected']} of {check['controls']}" if isinstance(check.get("controls"), int) else ""
        )
        detected = detected or f"{sum(dict(check['controls_detected']).values())} of {len(check['controls'])}"
        parts.append(
            tag(
                "p",
                f"Served by SGLang and compared with the oracle: {check['requests']} requests, largest logprob error "
                f"{check['max_logprob_error']:.1e} nats (allowed {check['tolerance']:.0e}), {detected} wrong plans "
                f"told apart: {'passed' if check['passed'] else 'FAILED'}.",
            )
        )
        parts.append(_made(check, _seed(check)))
    return join(parts) if parts else None


def pareto(found: Findings) -> Markup | None:
    """Where the bundle stands among the rules of bench-kv."""
    if found.pareto is None:
        return None
    judged, tokens = found.reports.get("eval"), found.bundle.recipe.evaluation.prompt_tokens
    here = (found.bundle.plan.reduction(tokens), judged["ratio"]) if judged else None
    said = "Perplexity ratio to dense; losses beyond 1.5 stand at the top. No block is removed in the lines"
    note = tag("p", said + (", this bundle loses blocks too." if here else "."))
    prompt = f"{found.pareto.get('options', {}).get('prompt', '?')} prompt tokens"
    return join([note, charts.pareto(found.pareto["rows"], here), _made(found.pareto, prompt, _seed(found.pareto))])


def load(found: Findings) -> Markup | None:
    """Ratios with intervals; absolute figures folded away."""
    parts = []
    for name, said in _loads(found).items():
        rows = [(one["figure"], one["low"], one["ratio"], one["high"]) for one in said["ratios"]]
        parts.append(tag("h3", name))
        if rows:
            rounds = len(said["ratios"][0]["rounds"])
            text = (
                f"Ratio in each of {rounds} interleaved rounds: geometric mean and 95% interval (paired t), coloured "
                "where it leaves 1 out."
            )
            if link := said.get("link"):
                text += f" KV went over a relay on loopback that lets {link} through."
            parts += [tag("p", text), charts.intervals(rows, name)]
        parts += [tag("p", sentence) for sentence in said.get("dropped", ())]
        load_of = {side: one.get("detail", one) for side, one in said["load"].items()}
        parts += [tag("p", tag("strong", f"{side}: "), why) for side, why in _warnings(load_of)]
        head = ("absolute, for the record", *load_of)
        figures: list[list[Any]] = [
            ["requests failed", *(f"{r['failed']} of {r['requests']}" for r in load_of.values())]
        ]
        for key in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"):
            cells = (" / ".join(_number(r[key][p], 0) for p in ("p50", "p90", "p95", "p99")) for r in load_of.values())
            figures.append([f"{key.removesuffix('_ms').upper()} ms p50/p90/p95/p99", *cells])
        for queue in ("prefill_queue", "decode_queue"):
            waits = [((r.get("workers") or {}).get("queues") or {}).get(queue) for r in load_of.values()]
            if any(waits):
                cells = (f"{_number(w['mean_ms'], 0)} / {_number(w['p95_ms'], 0)}" if w else "-" for w in waits)
                figures.append([f"{queue.replace('_', ' ')} ms mean/p95", *cells])
        figures.append(["output tokens/s", *(_number(r["output_tokens_per_s"], 2) for r in load_of.values())])
        parts.append(tag("details", tag("summary", "absolute figures of this machine"), table(head, figures)))
        parts.append(_made(said, _seed(said)))
    return join(parts) if parts else None


def workers(found: Findings) -> Markup | None:
    """How large a cluster: computed, and simulated where the report says so."""
    said = found.reports.get("sizing")
    if said is None or "workers" not in said:
        return None
    asked, counted = said["traffic"], said["workers"]
    sides = {name: SizedSide.model_validate(side) for name, side in counted["sides"].items()}
    link = f"{Link(asked['link_bits_per_s'])} link{' of each prefill worker' if counted['link_each'] else ''}"
    goal = goal_text(asked["rate"], counted["slo"]["ttft_s"], counted["slo"]["itl_s"])
    simulated = any(side.simulated for side in sides.values())
    notes = [
        tag("p", f"{goal}; {asked['isl']} tokens in, {asked['osl']} out, {link}."),
        table(("", *sides), workers_rows(sides)),
        *(tag("p", tag("strong", f"{n}: "), side.sizing.problem) for n, side in sides.items() if side.sizing.problem),
        *(tag("p", tag("strong", "doubtful rates: "), doubt) for doubt in counted.get("rates", {}).get("doubts", ())),
        tag("p", f"Computed{', and simulated, ' if simulated else ' '}not measured, from rates of one worker each. "
            f"Assumed: {counted['assumed']}."),
    ]  # fmt: skip
    return join([*notes, _made(said, "rates as in the command")])


def faults(found: Findings) -> Markup | None:
    """What was done to a running pair, and what it did to requests."""
    if found.faults is None:
        return None
    return join([fault_table(found.faults), _made(found.faults, _seed(found.faults))])


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
    return join([*parts, _built(found)])


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


def _loads(found: Findings) -> dict[str, Any]:
    """Comparisons by what they compare; a demo's is pruned over dense."""
    loads = {f"{said['second']} over {said['first']}": said for said in found.comparisons.values()}
    demo = found.reports.get("metrics")
    return ({"pruned over dense (demo)": demo} if demo and demo.get("ratios") else {}) | loads


def _warnings(loads: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (side, one["client"]["bottleneck"]) for side, one in loads.items() if one.get("client", {}).get("bottleneck")
    ]


def _seed(said: dict[str, Any]) -> str:
    seed = said.get("scenario", said.get("options", said)).get("seed")
    return f"seed {seed}" if seed is not None else "seeds as in the command"


def _built(found: Findings, *more: str) -> Markup:
    """The line under what the build left."""
    return _made(found.built, f"seed {found.bundle.manifest.seed}", *more)


def _made(said: dict[str, Any], *more: str) -> Markup:
    """The line under a figure: what makes it, where it was made."""
    environment = said.get("environment", {})
    machine, versions = environment.get("machine", {}), environment.get("versions", {})
    where = [
        f"{machine.get('cpu', 'unknown machine')}, {machine.get('cores', '?')} cores",
        f"torch {versions.get('torch', '?')}",
    ]
    return tag(
        "p", tag("code", environment.get("command", "command unknown")), "; ".join(["", *where, *more]), class_="made"
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"
