"""What this machine can build and serve, and the command for each thing that it lacks. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from pdtrim_deploy.doctor.base import Asked, Finding, Job, as_json, first_failures
from pdtrim_deploy.doctor.registry import CHECKS
from pdtrim_deploy.errors import UserError

__all__ = ["Asked", "Finding", "Job", "as_json", "examine", "first_failures", "require"]


def examine(asked: Asked, job: Job = "demo") -> Iterator[Finding]:
    """Every line on `job`, as it is found."""
    for check in CHECKS:
        if job in check.jobs:
            yield from check.look(asked)


def require(job: Job, asked: Asked) -> None:
    """Before long work: refuse it when the machine cannot do it.

    Raises:
        UserError: what is missing, and the commands that mend it.

    """
    failures = first_failures(examine(asked, job), job)
    if failures:
        said = "; ".join(f"{one.name}: {one.detail}" for one in failures)
        mends = "; ".join(dict.fromkeys(one.mend for one in failures if one.mend))
        raise UserError(f"this machine cannot {job}: {said}. Mend it with: {mends}")
