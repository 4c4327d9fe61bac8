"""Tasks that judge plans: perplexity, choice, needle, agreement; many plans at the cost of one prefill."""

from pdtrim_deploy.evaluation.tasks.base import Part, Setting, Task
from pdtrim_deploy.evaluation.tasks.registry import TASKS, check, prepare

__all__ = ["TASKS", "Part", "Setting", "Task", "check", "prepare"]
