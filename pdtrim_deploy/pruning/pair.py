"""Two stage models in memory: the dense model, which blocks each stage runs, and the tensors that differ from dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from pdtrim_deploy.models.blockwise import CausalLM
from pdtrim_deploy.models.prompt_tail import attach
from pdtrim_deploy.models.surgery import Replacements, keep_blocks
from pdtrim_deploy.plan import STAGES, Action, PDPlan, Stage

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class StagePair:
    """`changed` gives, by stage and block, tensors by their name within the block; the rest is the dense model's."""

    model: CausalLM
    plan: PDPlan
    changed: Mapping[Stage, Replacements] = field(default_factory=dict)

    def stage(self, stage: Stage) -> CausalLM:
        """That stage's model; what it has not changed it shares with the dense one."""
        plan = self.plan
        layers, experts, missing = plan.layers(stage), plan.kept_experts(stage), plan.missing(stage)
        model = keep_blocks(self.model, layers, self.changed.get(stage, {}), experts, missing)
        if stage == "prefill" and plan.kv_only_tail:
            attach(model, keep_blocks(self.model, layers, {}, experts, missing))
        return model

    def with_changes(self, stage: Stage, more: Replacements) -> StagePair:
        """The same with more tensors of one stage changed, or changed again."""
        merged: dict[int, Tensors] = dict(self.changed.get(stage, {}))
        for block, tensors in more.items():
            merged[block] = {**merged.get(block, {}), **tensors}
        return replace(self, changed={**self.changed, stage: merged})

    @property
    def shared_layers(self) -> int:
        """How many of the first layers are the dense model's in both stages."""
        plan, changed = self.plan, {block for blocks in self.changed.values() for block in blocks}
        changed |= {block for stage in STAGES for block in plan.kept_experts(stage)}
        for layer, blocks in enumerate(zip(plan.prefill_layers, plan.decode_layers, strict=False)):
            kept = all(plan.actions(stage)[layer].kind == "keep" for stage in STAGES)
            if blocks != (layer, layer) or not kept or layer in changed:
                return layer
        return min(len(plan.prefill_layers), len(plan.decode_layers))

    def spans(self, stage: Stage) -> tuple[tuple[int, int], ...]:
        """For each layer of the stage `(stop, next)`: its output stands for `x_stop`, what reads it wants `x_next`.

        They differ where blocks were dropped or run for their KV alone; `x_i` is the dense model's hidden state before
        block `i`.
        """
        layers, actions = self.plan.layers(stage), self.plan.actions(stage)
        follows = (*layers[1:], self.plan.model.num_blocks)
        return tuple((_stop(b, actions[b]), after) for b, after in zip(layers, follows, strict=True))

    def adds(self, stage: Stage, block: int) -> bool:
        """Whether that block changes the hidden state: all do but those that run for their KV alone."""
        return self.plan.actions(stage)[block].kind != "kv_only"


def _stop(block: int, action: Action) -> int:
    if action.kind == "kv_only":
        return block
    return (action.pair[1] if action.kind == "distilled" else block) + 1
