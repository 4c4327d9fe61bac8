"""The last line of each section: command, machine and seed of its figures."""

from __future__ import annotations

import math
from typing import Any

from pdtrim_deploy.report.html.collect import Findings
from pdtrim_deploy.report.html.markup import Markup, tag


def built(findings: Findings, *more: str) -> Markup:
    """The line below figures of the build."""
    return provenance(findings.built, f"seed {findings.bundle.manifest.seed}", *more)


def provenance(report: dict[str, Any], *more: str) -> Markup:
    """The line below a figure: its command, machine and versions."""
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
    """The seed of a report, of its options or of its scenario."""
    seed = report.get("scenario", report.get("options", report)).get("seed")
    return f"seed {seed}" if seed is not None else "seeds as in the command"


def number(value: float | None, digits: int) -> str:
    """`value` with so many digits; a dash if there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def loads_of(findings: Findings) -> dict[str, Any]:
    """Comparisons by the names of their sides; a demo compares pruned over dense."""
    loads = {
        f"{comparison['second']} over {comparison['first']}": comparison for comparison in findings.comparisons.values()
    }
    demo = findings.reports.get("metrics")
    return ({"pruned over dense (demo)": demo} if demo and demo.get("ratios") else {}) | loads
