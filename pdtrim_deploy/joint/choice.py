"""What may become of a block: what each stage does with it, and how its prompt KV travels. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, get_args

from pdtrim_deploy.plan import (
    Action,
    Drop,
    Keep,
    KVOnly,
    KVSend,
    ModelShape,
    PDPlan,
    WithoutAttention,
    WithoutMLP,
)

Prefill = Literal["keep", "skip", "without_attention", "without_mlp"]
"""`skip`: the hidden state stays as it is; K and V are computed where decode reads them."""
Decode = Literal["keep", "drop", "without_attention", "without_mlp"]
PREFILL: tuple[Prefill, ...] = get_args(Prefill)
DECODE: tuple[Decode, ...] = get_args(Decode)
_ACTIONS: dict[str, Action] = {
    "keep": Keep(), "drop": Drop(), "without_attention": WithoutAttention(), "without_mlp": WithoutMLP(),
}  # fmt: skip


@dataclass(frozen=True)
class BlockChoice:
    """Of one block; `send` means nothing where decode does not attend."""

    prefill: Prefill = "keep"
    decode: Decode = "keep"
    send: KVSend = field(default_factory=KVSend)

    @property
    def attends(self) -> bool:
        """Whether decode reads the block's prompt KV."""
        return self.decode in ("keep", "without_mlp")

    @property
    def possible(self) -> bool:
        """Whether prefill makes the KV that decode reads."""
        return not (self.attends and self.prefill == "without_attention")

    @property
    def kv_only(self) -> bool:
        """Whether prefill runs the block for its K and V alone."""
        return self.prefill == "skip" and self.attends

    @property
    def actions(self) -> tuple[Action, Action]:
        """Prefill's and decode's, as the plan has them."""
        skipped = KVOnly() if self.attends else Drop()
        return skipped if self.prefill == "skip" else _ACTIONS[self.prefill], _ACTIONS[self.decode]


Choices = tuple[BlockChoice, ...]
"""One a block."""


def block_choices(
    sends: Sequence[KVSend], prefill: Sequence[Prefill] = PREFILL, decode: Sequence[Decode] = DECODE
) -> tuple[BlockChoice, ...]:
    """All that a block may become with these actions and KV rules; the first leaves it whole, with the first rule."""
    choices = [
        BlockChoice(before, after, send)
        for before, after in product(prefill, decode)
        for send in (sends if BlockChoice(decode=after).attends else sends[:1])
    ]
    return tuple(choice for choice in choices if choice.possible)


def plan_of(shape: ModelShape, choices: Choices) -> PDPlan:
    """The plan that says the same; ValueError where decode attends nowhere."""
    prefill, decode = zip(*(choice.actions for choice in choices), strict=True)
    kv = tuple(shape.rule(block, choice.send) for block, choice in enumerate(choices) if choice.attends)
    return PDPlan(model=shape, prefill=prefill, decode=decode, kv=kv)
