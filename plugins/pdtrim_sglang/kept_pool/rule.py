"""Which prompt rows a cut layer keeps."""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim_deploy.plan import KVSend, PDPlan
from pdtrim_deploy.plan.kv import SHARE_UNIT


@dataclass(frozen=True)
class KeptRule:
    """The rows of a cut layer that `send` says, whatever their dtype on the wire: the plan's own arithmetic."""

    send: KVSend

    def rows(self, prompt_tokens: int) -> int:
        """Kept rows of a prompt."""
        return self.send.rows(prompt_tokens)

    def ranges(self, prompt_tokens: int) -> tuple[tuple[int, int], ...]:
        """The same as half-open ranges of prompt positions, ascending and disjoint."""
        return self.send.row_ranges(prompt_tokens)

    def hidden(self, prompt_tokens: int) -> int:
        """Rows of a prompt that are not kept."""
        return prompt_tokens - self.rows(prompt_tokens)

    def __str__(self) -> str:
        """As log lines and errors name it."""
        send = self.send
        least = f" (at least {send.share}/{SHARE_UNIT} of all)" if send.share else ""
        return f"{send.n_first} + {send.n_last}{least}"


def kept_rules(plan: PDPlan) -> dict[int, KeptRule]:
    """The rule of each cut layer of decode; layers that keep the same rows have equal ones."""
    return {
        layer: KeptRule(send.model_copy(update={"wire_dtype": "native"}))
        for layer, send in enumerate(plan.kv)
        if send.mode == "sparse"
    }
