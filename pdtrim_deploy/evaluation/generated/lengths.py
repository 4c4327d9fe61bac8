"""How long the prompts of a command's tasks are, and whether they can be asked."""

from __future__ import annotations

from collections.abc import Sequence

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.evaluation.generated.endpoint import Endpoint
from pdtrim_deploy.evaluation.generated.registry import TASKS

LENGTHS = 4096, 8192, 16384
"""Tokens of a prompt and its answers, where nothing else is given."""
_ANSWERS = 4  # a text must have room beside so many


def choose(names: Sequence[str], lengths: tuple[int, ...] | None, max_tokens: int | None) -> tuple[int, ...]:
    """The lengths, ascending; none where no task has long prompts.

    Raises:
        UserError: lengths are given and no task has long prompts, or a text would have no room beside its answers.

    """
    long = [name for name in names if TASKS[name].long]
    if not long:
        if lengths is not None:
            every = " or ".join(name for name, task in TASKS.items() if task.long)
            raise UserError(f"--lengths are of tasks with long prompts; give --tasks {every} too, or leave them out")
        return ()
    chosen = lengths or LENGTHS
    for name in long:
        answer = max_tokens or TASKS[name].max_tokens
        if chosen[0] < _ANSWERS * answer:
            raise UserError(
                f"{chosen[0]} tokens leave {name} no room for a text beside answers of {answer}; give --lengths of "
                f"{_ANSWERS * answer} and more, or lower --max-tokens"
            )
    return chosen


def check_contexts(lengths: Sequence[int], endpoints: Sequence[Endpoint]) -> None:
    """UserError where the longest prompt exceeds the context that an endpoint serves."""
    for endpoint in endpoints:
        if lengths and endpoint.context is not None and lengths[-1] > endpoint.context:
            fitting = ",".join(str(length) for length in lengths if length <= endpoint.context)
            advice = f"give --lengths {fitting}" if fitting else "give shorter --lengths"
            raise UserError(
                f"{endpoint.url} serves a context of {endpoint.context} tokens, and prompts of {lengths[-1]} were to "
                f"be sent; {advice}, or serve a model with a longer context"
            )
