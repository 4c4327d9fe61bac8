"""What sections end with: the line that says what made a figure, where, and with which seed."""

from __future__ import annotations

import math
from typing import Any

from pdtrim_deploy.report.html.collect import Findings
from pdtrim_deploy.report.html.markup import Markup, tag


def built(findings: Findings, *more: str) -> Markup:
    """The line under what the build left."""
    return provenance(findings.built, f"seed {findings.bundle.manifest.seed}", *more)


def provenance(report: dict[str, Any], *more: str) -> Markup:
    """The line under a figure: what makes it, where it was made."""
    environment = report.get("environment", {})
    machine, versions = environment.get("machine", {}), environment.get("versions", {})
    where = [
        f"{machine.get('cpu', 'unknown machine')}, {machine.get('cores', '?')} cores",
        f"torch {versions.get('torch', '?')}",
    ]
    return tag(
        "p", tag("code", environment.get("command", "command unknown")), "; ".join(["", *where, *more]), class_="made"
    )


def seed_of(report: dict[str, Any]) -> str:
    """As the report, its options or its scenario have it."""
    seed = report.get("scenario", report.get("options", report)).get("seed")
    return f"seed {seed}" if seed is not None else "seeds as in the command"


def number(value: float | None, digits: int) -> str:
    """With so many digits; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def loads_of(findings: Findings) -> dict[str, Any]:
    """Comparisons by what they compare; a demo's is pruned over dense."""
    loads = {
        f"{comparison['second']} over {comparison['first']}": comparison for comparison in findings.comparisons.values()
    }
    demo = findings.reports.get("metrics")
    return ({"pruned over dense (demo)": demo} if demo and demo.get("ratios") else {}) | loads
