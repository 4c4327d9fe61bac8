"""The recipe's `quality`: what share of the dense model's score a bundle must keep, by task."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

SERVED_TASKS = ("gsm8k", "humaneval", "mmlu", "ruler", "turns", "instructions")
TASKS = ("perplexity", "choice", "needle", "agreement", *SERVED_TASKS)
LM_EVAL = "lm_eval:"


def asks_mmlu(task: str) -> bool:
    """Whether a task asks questions of MMLU's test split, which corpus `questions` has too."""
    return task == "mmlu" or task.startswith(f"{LM_EVAL}mmlu")


def _known(gates: dict[str, float]) -> dict[str, float]:
    for name in gates:
        if name not in TASKS and not (name.startswith(LM_EVAL) and name != LM_EVAL):
            raise ValueError(f"{name!r} is no task; allowed: {', '.join(TASKS)} and {LM_EVAL}NAME")
    return gates


Gates = Annotated[
    dict[str, Annotated[float, Field(gt=0, strict=False)]],
    AfterValidator(_known),
    Field(
        description="by task, the least score over the dense model's that `eval` passes; of perplexity the largest "
        "ratio: {gsm8k: 0.95, perplexity: 1.02}"
    ),
]
