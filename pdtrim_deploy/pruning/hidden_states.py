"""Hidden states of a model under search, kept at the input of every block that it still runs."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from pdtrim_deploy.pruning.objective import Objective


class HiddenStates:
    """What each kept block reads, so that a candidate costs only the blocks behind the one it removes.

    Memory: sequences x tokens x kept blocks x hidden size, in the model's dtype (289 MB for 16 x 256 tokens of
    SmolLM2-135M in float32).
    """

    def __init__(self, objective: Objective, removed: Collection[int] = ()) -> None:
        self.objective = objective
        self.kept = [block for block in range(objective.blocks) if block not in removed]
        self._inputs: list[dict[int, Tensor]] = [{} for _ in range(objective.batches)]
        for batch, inputs in enumerate(self._inputs):
            hidden = objective.start(batch)
            for block in self.kept[:-1]:
                inputs[block] = hidden
                hidden = objective.run(batch, block, hidden)
            inputs[self.kept[-1]] = hidden

    def without(self, block: int, batch: int) -> Tensor:
        """float32 `[sequences, scored]`: losses of one batch with `block` removed too."""
        hidden = self._inputs[batch][block]
        for later in self._behind(block):
            hidden = self.objective.run(batch, later, hidden)
        return self.objective.losses(batch, hidden)

    def remove(self, block: int) -> float:
        """Remove `block` for good; the mean loss over all batches."""
        losses = []
        for batch, inputs in enumerate(self._inputs):
            hidden = inputs.pop(block)
            for later in self._behind(block):
                inputs[later] = hidden
                hidden = self.objective.run(batch, later, hidden)
            losses.append(self.objective.losses(batch, hidden))
        self.kept.remove(block)
        return float(torch.cat(losses).double().mean())

    def _behind(self, block: int) -> list[int]:
        return [later for later in self.kept if later > block]
