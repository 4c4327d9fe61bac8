"""What a stage does with each block of the original model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    """A value of the plan: cannot be changed, knows no other keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Keep(Frozen):
    """The block runs unchanged."""

    kind: Literal["keep"] = "keep"


class Drop(Frozen):
    """The block does not run."""

    kind: Literal["drop"] = "drop"


class Distilled(Frozen):
    """Two adjacent blocks run as one student, which stands at `pair[0]`; its K and V are those of `kv_from`."""

    kind: Literal["distilled"] = "distilled"
    pair: tuple[int, int]
    kv_from: int

    @model_validator(mode="after")
    def _adjacent(self) -> Distilled:
        if self.pair[1] != self.pair[0] + 1:
            raise ValueError(f"distilled pair {self.pair} is not adjacent")
        if self.kv_from not in self.pair:
            raise ValueError(f"distilled pair {self.pair} cannot take its KV from block {self.kv_from}")
        return self


class KVOnly(Frozen):
    """Prefill only: the block makes its K and V, by projections fitted to that, and leaves the hidden state as it is.

    So decode may keep a block that prefill all but skips (POP, arXiv:2602.03295). In the checkpoint it is a layer of
    its own whose o_proj and down_proj are zero: any engine runs it rightly, one that knows it skips the rest.
    """

    kind: Literal["kv_only"] = "kv_only"


class WithoutAttention(Frozen):
    """The block's MLP runs alone. It makes no K and V, so decode needs no prompt KV of it, whatever prefill does.

    In the checkpoint its o_proj is zero: any engine runs it rightly, and those that know it skip the attention.
    """

    kind: Literal["without_attention"] = "without_attention"


class WithoutMLP(Frozen):
    """The block's attention runs alone; in the checkpoint its down_proj is zero."""

    kind: Literal["without_mlp"] = "without_mlp"


BODY = "body"
"""Folder in a prefill checkpoint whose plan has a tail: a checkpoint of the `KVOnly` blocks, fitted or trained.

Tokens before the tail go through these for their K and V. The checkpoint around it has all blocks, with the model's own
weights.
"""
KV_ONLY_SHARE = 0.1
"""Of a whole block's work: both projections are 1.5 to 6.3 % of the weights of the blocks whose facts we ship."""

Action = Annotated[Keep | Drop | Distilled | KVOnly | WithoutAttention | WithoutMLP, Field(discriminator="kind")]
Sublayer = Literal["attention", "mlp"]
SUBLAYER_SHARES: dict[Sublayer, float] = {"attention": 0.2, "mlp": 0.8}
"""Of a whole block's work: attention has 12 to 25 % of the weights of dense blocks whose facts we ship."""


def missing_sublayer(action: Action) -> Sublayer | None:
    """The sublayer that a block with this action runs without, while its other one runs."""
    if action.kind == "without_attention":
        return "attention"
    return "mlp" if action.kind == "without_mlp" else None


def check_kv_of(block: int, before: Action, after: Action, tail: int) -> None:
    """Raise ValueError, naming the block, where prefill makes no K and V of a block that decode runs with attention.

    Without attention decode needs none, and prefill may do as it likes with the block. K and V that decode does not
    read are for the `tail`, the last tokens of a prompt that run all blocks.
    """
    if after.kind == "kv_only":
        raise ValueError(f"block {block} is kv_only in decode; only prefill may run a block for its KV alone")
    attends = after.kind in ("keep", "without_mlp")
    if before.kind == "drop" and after.kind not in ("drop", "without_attention"):
        raise ValueError(f"block {block} is dropped in prefill but not in decode")
    if before.kind == "kv_only" and not (tail or attends or getattr(after, "kv_from", None) == block):
        raise ValueError(f"block {block} is kv_only in prefill but decode does not read its KV")
    if before.kind == "without_attention" and (attends or getattr(after, "kv_from", None) == block):
        raise ValueError(
            f"block {block} runs without attention in prefill, which so makes no KV of it, but decode reads its KV; "
            "drop its attention in decode too, or make it kv_only in prefill"
        )


def check_pairs(stage: str, actions: tuple[Action, ...]) -> None:
    """Raise ValueError, naming the block, unless every pair is marked on both of its blocks and on no other."""
    for block, action in enumerate(actions):
        if action.kind != "distilled":
            continue
        if block not in action.pair:
            raise ValueError(f"{stage} block {block} is marked distilled as pair {action.pair}")
        other = action.pair[0] + action.pair[1] - block
        if other >= len(actions) or actions[other] != action:
            raise ValueError(f"{stage} block {block}: pair {action.pair} is not marked on block {other} too")
