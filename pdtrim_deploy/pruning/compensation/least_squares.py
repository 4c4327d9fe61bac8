"""Refit down_proj around each gap, so that the stage follows the dense model's hidden states."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pdtrim_deploy.blockwise import Blockwise, LayerKV, Span
from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.compensation.base import Progress
from pdtrim_deploy.pruning.least_squares import Refit, set_down
from pdtrim_deploy.pruning.pair import StagePair

_BATCH = 4
_CHECKED = 8  # one batch in so many chooses the penalty


class LeastSquares:
    """Layer by layer, each on what the refitted layers before it really give: errors do not add up.

    Args:
        least_gain: the layer in front of a gap is refitted, and those behind it while the error falls by this share.

    """

    def __init__(self, least_gain: float = 0.02) -> None:
        self.least_gain = least_gain

    @torch.no_grad()
    def compensate(self, pair: StagePair, stage: Stage, ids: Tensor, progress: Progress) -> StagePair:
        """Targets are `x_next` of the dense model for the same tokens. UserError when an error is not a number."""
        walk, going = _Walk(pair, stage, ids), pair.plan.layers(stage)[0] != 0
        changed: dict[int, dict[str, Tensor]] = {}
        for layer, (block, (stop, after)) in enumerate(zip(pair.plan.layers(stage), pair.spans(stage), strict=True)):
            walk.enter(layer, after)
            if pair.adds(stage, block) and (going or stop != after):
                refit = Refit(walk.runner, layer)
                for batch in range(walk.batches):
                    refit.add(*walk.asked(batch), check=walk.checks(batch), kv=walk.kv(batch))
                weight, before, error = refit.solve()
                if not math.isfinite(error):
                    raise UserError(f"{stage} block {block}: its error is {error}; load the model in float32")
                progress(f"{stage} block {block}: relative squared error {before:.4f} -> {error:.4f}")
                changed[block] = {"mlp.down_proj.weight": weight}
                set_down(walk.runner.layers[layer], weight)
                going = error < (1 - self.least_gain) * before
            going = going or stop != after
            walk.leave(layer)
        return pair.with_changes(stage, changed)


class _Walk:
    """The stage, the dense model and, for decode, the prefill stage, all at the same depth."""

    def __init__(self, pair: StagePair, stage: Stage, ids: Tensor) -> None:
        self.runner, self._dense = Blockwise(pair.stage(stage)), Blockwise(pair.model)
        self._prompt = ids.shape[1] // 2 if stage == "decode" else 0
        self._prefill = Blockwise(pair.stage("prefill"))
        self._map, self._depth, self._made = pair.plan.layer_map, 0, 0
        parts = ids.split(_BATCH if len(ids) > _BATCH else 1)
        self.batches = len(parts)
        self._wanted = [self._dense.embed(part) for part in parts]
        self._mine = [self.runner.embed(part[:, self._prompt :], self._prompt) for part in parts]
        self._prompts = [self._prefill.embed(part[:, : self._prompt]) for part in parts] if self._prompt else []
        self._held: list[LayerKV] = []

    def checks(self, batch: int) -> bool:
        """Whether that batch chooses the penalty: every eighth, from the last backwards."""
        return (self.batches - 1 - batch) % _CHECKED == 0 and self.batches > 1

    def enter(self, layer: int, after: int) -> None:
        """Bring the dense model to the input of block `after`, and prefill through what sends to `layer`."""
        while self._depth < after:
            self._wanted = [(self._dense.block(self._depth, x, span), span) for x, span in self._wanted]
            self._depth += 1
        while self._prompt and self._made <= self._map[layer]:
            self._held = [LayerKV() for _ in self._prompts]
            given = zip(self._prompts, self._held, strict=True)
            self._prompts = [(self._prefill.block(self._made, x, span, kv), span) for (x, span), kv in given]
            self._made += 1

    def asked(self, batch: int) -> tuple[Tensor, Span, Tensor]:
        """`Refit.add`'s input, span and target of one batch."""
        return (*self._mine[batch], self._wanted[batch][0][:, self._prompt :])

    def kv(self, batch: int) -> LayerKV | None:
        """The prompt's KV that this layer of decode reads."""
        return self._held[batch].fork() if self._prompt else None

    def leave(self, layer: int) -> None:
        """Run the stage through `layer`."""
        self._mine = [
            (self.runner.block(layer, x, span, self.kv(batch)), span) for batch, (x, span) in enumerate(self._mine)
        ]
