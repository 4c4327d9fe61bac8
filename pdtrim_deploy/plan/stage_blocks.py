"""Which blocks each stage runs, and which prefill block makes the prompt KV that a decode block reads.

Blocks are always named by their index in the original model. A *layer* is a block's place in a stage model:
layer `j` of the decode model is block `decode_layers[j]`. A *KV layer* is a layer's place among those of its stage
that have K and V, which is its place in the stage's KV pool: all but those without attention, and those whose attention
is linear and keeps a state instead.
"""

from __future__ import annotations

from functools import cached_property
from itertools import takewhile
from typing import Literal

from pydantic import NonNegativeInt, model_validator

from pdtrim_deploy.plan.blocks import (
    KV_ONLY_SHARE,
    SUBLAYER_SHARES,
    Action,
    Frozen,
    Sublayer,
    check_kv_of,
    check_pairs,
    missing_sublayer,
)
from pdtrim_deploy.plan.model_shape import ModelShape

Stage = Literal["prefill", "decode"]
STAGES: tuple[Stage, ...] = ("prefill", "decode")


class StageBlocks(Frozen):
    """The blocks of both stages of a model.

    Attributes:
        prefill, decode: one action per block of the original model.
        kv_only_tail: the last tokens of a prompt, which run all blocks of prefill whole, with the model's own weights.
            With it the last blocks of prefill are those that run for their K and V alone, so that other tokens share
            all that comes before with the tail, and end there; 0: none, and absent from JSON.

    """

    version: Literal[1] = 1
    model: ModelShape
    prefill: tuple[Action, ...]
    decode: tuple[Action, ...]
    kv_only_tail: NonNegativeInt = 0

    @model_validator(mode="after")
    def _blocks_fit(self) -> StageBlocks:
        for stage in STAGES:
            actions = self.actions(stage)
            if len(actions) != self.model.num_blocks:
                raise ValueError(f"{stage} names {len(actions)} blocks, the model has {self.model.num_blocks}")
            check_pairs(stage, actions)
            if not self.layers(stage):
                raise ValueError(f"{stage} keeps no block")
        for block, (before, after) in enumerate(zip(self.prefill, self.decode, strict=True)):
            check_kv_of(block, before, after, self.kv_only_tail)
        changed = [block for block, action in enumerate(self.decode) if action.kind != "keep"]
        if self.model.states and changed:
            raise ValueError(f"decode does not keep block {changed[0]} of a model with linear attention")
        if self.model.states and self.prefill != self.decode:
            raise ValueError("prefill and decode of a model with linear attention run the same blocks")
        if not self.decode_kv_blocks:
            raise ValueError("decode keeps no attention, so that it could not see the prompt")
        for block in self.decode_kv_blocks:
            if self._kv_source(block) is None:
                raise ValueError(f"decode block {block} has no prefill block to take its prompt KV from")
        if self.kv_only_tail and not self.kv_only_layers:
            raise ValueError(f"kv_only_tail is {self.kv_only_tail} but prefill runs no block for its K and V alone")
        if self.kv_only_tail and self.kv_only_layers[0] == 0:
            raise ValueError(f"kv_only_tail is {self.kv_only_tail} but prefill runs no block whole for other tokens")
        if self.kv_only_tail and (whole := [b for b in self._behind_kv_only if self.prefill[b].kind != "kv_only"]):
            raise ValueError(
                f"kv_only_tail is {self.kv_only_tail} but prefill runs block {whole[0]} behind a kv_only one"
            )
        return self

    def actions(self, stage: Stage) -> tuple[Action, ...]:
        """The stage's action for every block."""
        return self.prefill if stage == "prefill" else self.decode

    def layers(self, stage: Stage) -> tuple[int, ...]:
        """Blocks of the stage model in order; a distilled pair stands at its first block."""
        return _layers(self.actions(stage))

    def kv_blocks(self, stage: Stage) -> tuple[int, ...]:
        """Blocks of the stage's KV layers: all that it runs but those without attention, or with a linear one."""
        return kv_blocks_of(self.model, self.actions(stage))

    def missing(self, stage: Stage) -> dict[int, Sublayer]:
        """By block, the sublayer that the stage runs it without; empty where it runs blocks whole."""
        lacks = ((block, missing_sublayer(action)) for block, action in enumerate(self.actions(stage)))
        return {block: sublayer for block, sublayer in lacks if sublayer is not None}

    def dropped(self, stage: Stage) -> tuple[int, ...]:
        """Blocks that the stage does not run at all."""
        return tuple(block for block, action in enumerate(self.actions(stage)) if action.kind == "drop")

    @cached_property
    def kv_only_layers(self) -> tuple[int, ...]:
        """Layers of the prefill model that run for their K and V alone."""
        return tuple(j for j, block in enumerate(self.prefill_layers) if self.prefill[block].kind == "kv_only")

    @property
    def kv_only_blocks(self) -> tuple[int, ...]:
        """Blocks of `kv_only_layers`."""
        return tuple(self.prefill_layers[layer] for layer in self.kv_only_layers)

    @cached_property
    def last_whole_blocks(self) -> tuple[int, ...]:
        """Blocks that prefill keeps whole, behind its first and any that it does not.

        These may be KV-only where there is a tail.
        """
        kept = list(takewhile(lambda block: self.prefill[block].kind == "keep", reversed(self.prefill_layers[1:])))
        return tuple(reversed(kept))

    @property
    def _behind_kv_only(self) -> tuple[int, ...]:
        """Blocks of prefill from the first that runs for its K and V alone."""
        return self.prefill_layers[self.kv_only_layers[0] :] if self.kv_only_layers else ()

    def prefill_share(self, tokens: int) -> float:
        """What prefill computes of a prompt of so many tokens, of the unpruned model's blocks.

        A token that is not of the tail costs `KV_ONLY_SHARE` of a layer that runs for its K and V alone.
        """
        spared = (1 - KV_ONLY_SHARE) * len(self.kv_only_layers) * (1 - min(1.0, self.kv_only_tail / tokens))
        return (self._work("prefill") - spared) / self.model.num_blocks

    @property
    def decode_share(self) -> float:
        """What decode computes, of the unpruned model's blocks; a missing sublayer spares its `SUBLAYER_SHARES`."""
        return self._work("decode") / self.model.num_blocks

    def _work(self, stage: Stage) -> float:
        """Layers of the stage, less what missing sublayers spare of them."""
        return len(self.layers(stage)) - sum(SUBLAYER_SHARES[lost] for lost in self.missing(stage).values())

    @cached_property
    def prefill_layers(self) -> tuple[int, ...]:
        """Blocks of the prefill model in order."""
        return self.layers("prefill")

    @cached_property
    def decode_layers(self) -> tuple[int, ...]:
        """Blocks of the decode model in order."""
        return self.layers("decode")

    @cached_property
    def prefill_kv_blocks(self) -> tuple[int, ...]:
        """Blocks of prefill's KV layers."""
        return self.kv_blocks("prefill")

    @cached_property
    def decode_kv_blocks(self) -> tuple[int, ...]:
        """Blocks of decode's KV layers, in the order of `kv`."""
        return self.kv_blocks("decode")

    def _kv_source(self, block: int) -> int | None:
        action = self.decode[block]
        parent = action.kv_from if action.kind == "distilled" else block
        made_by = self.prefill[parent]
        if made_by.kind in ("keep", "kv_only", "without_mlp"):
            return self.prefill_kv_blocks.index(parent)
        if made_by.kind == "distilled" and made_by.kv_from == parent:
            return self.prefill_kv_blocks.index(made_by.pair[0])
        return None

    @cached_property
    def layer_map(self) -> tuple[int, ...]:
        """For each KV layer of decode, the KV layer of prefill whose prompt KV it reads."""
        return tuple(source for b in self.decode_kv_blocks if (source := self._kv_source(b)) is not None)

    @property
    def read_blocks(self) -> frozenset[int]:
        """Blocks of prefill whose K and V decode reads."""
        return frozenset(self.prefill_kv_blocks[source] for source in self.layer_map)

    @cached_property
    def kv_sources(self) -> tuple[int | None, ...]:
        """For each layer of decode, the layer of prefill whose prompt KV it reads; None for one without attention."""
        made_by = (self.prefill_layers.index(self.prefill_kv_blocks[source]) for source in self.layer_map)
        read = dict(zip(self.decode_kv_blocks, made_by, strict=True))
        return tuple(read.get(block) for block in self.decode_layers)


def _layers(actions: tuple[Action, ...]) -> tuple[int, ...]:
    """Blocks of a stage's model in order."""
    return tuple(
        block
        for block, action in enumerate(actions)
        if action.kind != "drop" and (action.kind != "distilled" or action.pair[0] == block)
    )


def kv_blocks_of(model: ModelShape, actions: tuple[Action, ...]) -> tuple[int, ...]:
    """Blocks of a stage of the model that have K and V."""
    keeps_kv = set(model.kv_blocks)
    return tuple(b for b in _layers(actions) if b in keeps_kv and actions[b].kind != "without_attention")
