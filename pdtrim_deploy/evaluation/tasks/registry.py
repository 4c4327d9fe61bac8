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


def check(name: str) -> None:
    """UserError for a task that does not exist."""
    if name not in TASKS:
        raise UserError(f"{name!r} is no task; use one of {', '.join(TASKS)}")


def prepare(name: str, setting: Setting) -> Task:
    """The task `name` with its items; UserError for an unknown one, or one that the model's context cannot hold."""
    check(name)
    task, room = TASKS[name](setting), setting.dense.decode_model.config.max_position_embeddings
    if (needed := max(part.positions for part in task.parts)) > room:
        raise UserError(f"task {name} needs a context of {needed} tokens, the model has {room}; leave the task out")
    return task
