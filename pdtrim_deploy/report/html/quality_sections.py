"""The loss of quality, and the bundle among other KV rules."""

from __future__ import annotations

from pdtrim_deploy.bundle.recoveries import HEAD, recoveries
from pdtrim_deploy.report.html import charts
from pdtrim_deploy.report.html.collect import Findings
from pdtrim_deploy.report.html.footing import provenance, seed_of
from pdtrim_deploy.report.html.markup import Markup, join, table, tag


def quality(findings: Findings) -> Markup | None:
    """Perplexity, tasks and fidelity."""
    parts, tokens = [], findings.bundle.recipe.evaluation.prompt_tokens
    if judged := findings.reports.get("eval"):
        rows = [
            ("dense", "1.00x", f"{judged['dense']['ppl']:.3f}", "1"),
            (
                "this bundle",
                f"{findings.bundle.plan.reduction(tokens):.2f}x",
                f"{judged['pd']['ppl']:.3f}",
                f"{judged['ratio']:.4f}",
            ),
        ]
        parts.append(table(("", "fewer KV bytes", "perplexity", "ratio"), rows))
        parts.append(provenance(judged, f"seed {judged['text']['seed']}", f"corpus {judged['text']['corpus']}"))
    if tasks := findings.reports.get("tasks"):
        figures = [
            (
                f"{task['task']}: {row['measure']}" + (f", {row['group']}" if row["group"] else ""), row["items"],
                f"{row['dense']:.4f}", f"{row['pd']:.4f}",
                f"{row['difference']:+.4f}" + (f" ± {row['stderr']:.4f}" if row["stderr"] is not None else ""),
            )
            for task in tasks["tasks"] for row in task["figures"]
        ]  # fmt: skip
        parts.append(table(("task", "items", "dense", "this bundle", "difference ± standard error"), figures))
        parts.append(provenance(tasks, f"seed {tasks['seed']}", f"corpus {tasks['corpus']}"))
    bundle = findings.bundle
    if kept := recoveries(bundle.reports_dir, bundle.plan.digest, bundle.recipe.quality):
        parts.append(table(HEAD, kept))
        parts.append(tag("p", "Recovery is the score over the dense model's; of perplexity the ratio, less is better."))
    if check := findings.reports.get("fidelity"):
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
        parts.append(provenance(check, seed_of(check)))
    return join(parts) if parts else None


def pareto(findings: Findings) -> Markup | None:
    """The bundle among the KV rules of bench-kv."""
    if findings.pareto is None:
        return None
    judged, tokens = findings.reports.get("eval"), findings.bundle.recipe.evaluation.prompt_tokens
    here = (findings.bundle.plan.reduction(tokens), judged["ratio"]) if judged else None
    text = "Perplexity ratio to dense; ratios above 1.5 are drawn at the top. The lines remove no blocks"
    note = tag("p", text + (", but this bundle does." if here else "."))
    prompt = f"{findings.pareto.get('options', {}).get('prompt', '?')} prompt tokens"
    return join(
        [
            note,
            charts.pareto(findings.pareto["rows"], here),
            provenance(findings.pareto, prompt, seed_of(findings.pareto)),
        ]
    )
