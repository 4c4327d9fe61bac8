"""All tasks, and the one way in."""

from __future__ import annotations

from collections.abc import Callable

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.tasks import agreement, choice, needle, perplexity
from pdtrim_deploy.evaluation.tasks.base import Setting, Task

TASKS: dict[str, Callable[[Setting], Task]] = {
    "perplexity": perplexity.prepare,
    "choice": choice.prepare,
    "needle": needle.prepare,
    "agreement": agreement.prepare,
}


def prepare(name: str, setting: Setting) -> Task:
    """The task `name` with its items; UserError for an unknown one."""
    if name not in TASKS:
        raise UserError(f"{name!r} is no task; use one of {', '.join(TASKS)}")
    return TASKS[name](setting)
