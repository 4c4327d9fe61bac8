"""What this machine can build and serve, and the command that adds what is missing.

Imports torch only to measure its rate.
"""

from __future__ import annotations

from collections.abc import Iterator

from pdtrim_deploy.doctor.base import CheckContext, Finding, Job, as_json, first_failures
from pdtrim_deploy.doctor.registry import CHECKS
from pdtrim_deploy.errors import UserError

__all__ = ["Asked", "Finding", "Job", "as_json", "examine", "first_failures", "require"]


def examine(context: CheckContext, job: Job = "demo") -> Iterator[Finding]:
    """All findings that concern `job`, one at a time."""
    for check in CHECKS:
        if job in check.jobs:
            yield from check.look(context)


def require(job: Job, context: CheckContext) -> None:
    """Refuse `job` before the work starts when the machine cannot do it.

    Raises:
        UserError: what is missing, and the commands that add it.

    """
    failures = first_failures(examine(context, job), job)
    if failures:
        problems = "; ".join(f"{finding.name}: {finding.detail}" for finding in failures)
        mends = "; ".join(dict.fromkeys(finding.mend for finding in failures if finding.mend))
        raise UserError(f"this machine cannot {job}: {problems}. Fix it with: {mends}")
