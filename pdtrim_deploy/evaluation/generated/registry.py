"""All generated tasks."""

from __future__ import annotations

from pdtrim_deploy.evaluation.generated import gsm8k, humaneval, instructions, mmlu, ruler, turns
from pdtrim_deploy.evaluation.generated.base import GeneratedTask

TASKS: dict[str, GeneratedTask] = {
    task.name: task for task in (gsm8k.TASK, humaneval.TASK, mmlu.TASK, ruler.TASK, turns.TASK, instructions.TASK)
}
