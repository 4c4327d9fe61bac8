"""Which prompt rows a cut layer keeps."""

from __future__ import annotations

from dataclasses import dataclass

from pdtrim_deploy.plan import PDPlan


@dataclass(frozen=True)
class KeptRule:
    """The first `n_first` and the last `n_last` prompt rows; all of a prompt that is not longer."""

    n_first: int
    n_last: int

    def rows(self, prompt_tokens: int) -> int:
        """Kept rows of a prompt."""
        return min(prompt_tokens, self.n_first + self.n_last)

    def hidden(self, prompt_tokens: int) -> int:
        """Rows of a prompt that are not kept."""
        return prompt_tokens - self.rows(prompt_tokens)

    def __str__(self) -> str:
        """As log lines and errors name it."""
        return f"{self.n_first} + {self.n_last}"


def kept_rules(plan: PDPlan) -> dict[int, KeptRule]:
    """The rule of each cut layer of decode."""
    return {layer: KeptRule(send.n_first, send.n_last) for layer, send in enumerate(plan.kv) if send.mode == "sparse"}
