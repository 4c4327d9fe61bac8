"""The interface of KV selection: how the prompt KV of each decode layer travels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.recipe.kv_cost import STATES

Progress = Callable[[str], None]
Sends = tuple[KVSend, ...]
Memo = Callable[[str, Callable[[], Tensor]], Tensor]
"""`memo(name, make)`: the result of `make()`, computed at the first call with that name on the same problem."""


@dataclass(frozen=True)
class Problem:
    """The stage models and the text to choose on.

    Attributes:
        oracle: the stage models, pruned already; its plan's KV rules are ignored.
        sequences: calibration text, int64 `[S, N + T]`, the first `prompt_tokens` = N of each are its prompt, T >= 2.
        seed: for all random draws of a method.
        memo: stores slow measurements, so that a later choice can reuse them; None: nothing is stored.
        state_bytes: of hidden states that go through the model side by side, at most.
        longer: the same stages with longer prompts, on which effects are measured as well.
        work: folder for data that is too large for memory; None: the system's folder of temporary files.

    """

    oracle: PDOracle
    sequences: Tensor
    prompt_tokens: int
    seed: int = 0
    memo: Memo | None = None
    work: Path | None = None
    longer: tuple[Problem, ...] = ()
    state_bytes: int = STATES

    @property
    def prompts(self) -> tuple[int, ...]:
        """Prompt tokens of this problem, and of those with longer prompts."""
        return (self.prompt_tokens, *(problem.prompt_tokens for problem in self.longer))

    @property
    def layers(self) -> int:
        """KV layers of the decode model."""
        return len(self.oracle.plan.kv)

    @property
    def windowed(self) -> tuple[bool, ...]:
        """By layer of decode, whether it attends to a window, all of whose rows travel."""
        plan = self.oracle.plan
        return tuple(plan.model.window(block) is not None for block in plan.decode_kv_blocks)

    def rule(self, layer: int, send: KVSend) -> KVSend:
        """What a rule means for a layer of decode."""
        plan = self.oracle.plan
        return plan.model.rule(plan.decode_kv_blocks[layer], send)


@dataclass(frozen=True)
class Cut:
    """The two rules of a method that only chooses layers."""

    full: KVSend
    sparse: KVSend

    def sends(self, layers: int, sparse: Collection[int]) -> Sends:
        """One rule per decode layer, those in `sparse` cut."""
        return tuple(self.sparse if layer in sparse else self.full for layer in range(layers))

    def best(self, scores: Sequence[float], count: int) -> Sends:
        """The `count` layers of highest score cut; ties go to the earlier layer. UserError: there are fewer layers."""
        if count > len(scores):
            raise UserError(
                f"sparse_layers is {count} but decode keeps {len(scores)} layers; choose at most {len(scores)}"
            )
        ranked = sorted(range(len(scores)), key=lambda layer: (-scores[layer], layer))
        return self.sends(len(scores), ranked[:count])

    def above(self, scores: Sequence[float], threshold: float) -> Sends:
        """The layers whose score is at least `threshold` cut."""
        return self.sends(len(scores), [layer for layer, score in enumerate(scores) if score >= threshold])


class Selection(Protocol):
    """A method with its settings; equal problems give equal results."""

    def choose(self, problem: Problem, progress: Progress) -> Sends:
        """One rule per decode layer, in their order. UserError: the settings cannot be met."""
        ...
