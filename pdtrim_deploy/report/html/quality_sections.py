"""What the savings cost, and where the bundle stands among other rules."""

from __future__ import annotations

from pdtrim_deploy.report.html import charts
from pdtrim_deploy.report.html.collect import Findings
from pdtrim_deploy.report.html.footing import made, seed_of
from pdtrim_deploy.report.html.markup import Markup, join, table, tag


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
        parts.append(made(judged, f"seed {judged['text']['seed']}", f"corpus {judged['text']['corpus']}"))
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
        parts.append(made(tasks, f"seed {tasks['seed']}", f"corpus {tasks['corpus']}"))
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
        parts.append(made(check, seed_of(check)))
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
    return join([note, charts.pareto(found.pareto["rows"], here), made(found.pareto, prompt, seed_of(found.pareto))])
