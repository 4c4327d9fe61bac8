"""The page itself: sections in their order, one style sheet, nothing fetched."""

from __future__ import annotations

from pathlib import Path

from pdtrim_deploy.report.html import build_sections, load_sections, quality_sections, sections
from pdtrim_deploy.report.html.collect import Findings
from pdtrim_deploy.report.html.markup import Markup, join, tag

SECTIONS = {
    "Plan": sections.plan,
    "Quality": quality_sections.quality,
    "Load": load_sections.load,
    "Workers for a rate": load_sections.workers,
    "Quality for each byte": quality_sections.pareto,
    "Target": build_sections.target,
    "Search": build_sections.search,
    "What was mended": build_sections.mended,
    "Where decode looks": build_sections.attention,
    "Faults": sections.faults,
    "Engines": sections.engines,
    "Where this comes from": sections.origin,
}
STYLE = Path(__file__).with_name("style.css")


def page(findings: Findings, command: str) -> str:
    """The whole document; `command` is the one that wrote it."""
    name, plan = findings.bundle.recipe.name, findings.bundle.plan
    body = [
        tag("h1", name),
        tag("p", f"{findings.bundle.recipe.model.source}, plan {plan.digest[:12]}, pdtrim-deploy report", class_="sub"),
        sections.headline(findings),
    ]
    for title, make in SECTIONS.items():
        section = make(findings)
        if section:
            body.append(tag("section", tag("h2", title), section))
    body.append(tag("p", "This page: ", tag("code", command), class_="made"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{name}: pdtrim-deploy report"),
        tag("style", Markup(STYLE.read_text())),
    )
    return "<!DOCTYPE html>\n" + join([tag("html", head, tag("body", *body), lang="en")]) + "\n"
