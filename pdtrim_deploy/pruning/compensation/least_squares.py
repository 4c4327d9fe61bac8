"""Refit down_proj around each gap, so that the stage follows the dense model's hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.compensation.base import WHOLE_MAPS, FitRules, Progress
from pdtrim_deploy.pruning.compensation.target_states import TargetStates
from pdtrim_deploy.pruning.least_squares import Refit, set_down
from pdtrim_deploy.pruning.pair import StagePair

_CHECKED = 8  # one batch in so many chooses the penalty


class LeastSquares:
    """Layer by layer, each on what the refitted layers before it really give: errors do not add up.

    Args:
        least_gain: the layer in front of a gap is refitted, and those behind it while the error falls by this share.
        rules: whether text that is too short is fitted by a low rank, and what decode is fitted to of prompts.

    """

    def __init__(self, least_gain: float = 0.02, rules: FitRules = WHOLE_MAPS) -> None:
        self.least_gain, self.rules = least_gain, rules

    def compensate(self, pair: StagePair, stage: Stage, ids: Tensor, progress: Progress) -> StagePair:
        """Targets are `x_next` of the dense model for the same tokens. UserError when an error is not a number."""
        return self.compensate_all((pair,), stage, ids, progress)[0]

    @torch.no_grad()
    def compensate_all(
        self, pairs: Sequence[StagePair], stage: Stage, ids: Tensor, progress: Progress
    ) -> list[StagePair]:
        """The same for pairs of one prefill stage, or, for `stage` prefill, any: what surrounds them is run once."""
        targets = TargetStates(pairs[0], stage, ids)
        text_share = 1.0 if self.rules.sequences is None else len(ids) / self.rules.sequences
        fits = [_Fit(pair, stage, targets, self.least_gain, self.rules, text_share) for pair in pairs]
        while targets.depth < targets.blocks:
            targets.advance()
            for fit in fits:
                fit.advance()
            progress(f"{stage}: least squares, {targets.depth}/{targets.blocks} blocks{fits[0].refitted}")
            targets.forget(min(fit.reads for fit in fits))
        return [pair.with_changes(stage, fit.changed) for pair, fit in zip(pairs, fits, strict=True)]


class _Fit:
    """One stage on its way through the depths of the dense model."""

    def __init__(
        self, pair: StagePair, stage: Stage, targets: TargetStates, least_gain: float, rules: FitRules,
        text_share: float,
    ) -> None:  # fmt: skip
        self._pair, self._stage, self._targets = pair, stage, targets
        self._sources, self._least_gain, self._rules = pair.plan.kv_sources, least_gain, rules
        self._text_share = text_share
        self._missing = pair.plan.missing(stage)
        self._layers, self._spans = pair.plan.layers(stage), pair.spans(stage)
        self._run = LayerRun(Blockwise(pair.stage(stage)), targets.parts, targets.prompt)
        self._alone = LayerRun(self._run.runner, targets.prompts if rules.prompt_share else ())
        self._going = self._layers[0] != 0  # whether errors come from before
        self.changed: dict[int, dict[str, Tensor]] = {}
        self.refitted = ""  # what that did to the error at this depth, for a reader

    @property
    def reads(self) -> int:
        """The layer of prefill whose KV is read next."""
        left = [source for source in self._sources[self._run.layer :] if source is not None]
        return left[0] if left else max(source for source in self._sources if source is not None)

    def advance(self) -> None:
        """Through the layer whose reader is the block at the dense model's depth, if the stage has one, refitted."""
        layer, self.refitted = self._run.layer, ""
        if not self._run.running or self._spans[layer][1] != self._targets.depth:
            return
        block, (stop, after) = self._layers[layer], self._spans[layer]
        lost = stop != after or block in self._missing
        refits = self._pair.adds(self._stage, block) and self._missing.get(block) != "mlp"
        if refits and (self._going or lost):
            self._refit(block)
        self._going = self._going or lost
        self._run.advance([self._kv(batch) for batch in range(len(self._run.states))])
        self._alone.advance()

    def _refit(self, block: int) -> None:
        run, batches = self._run, len(self._run.states)
        refit = Refit(run.runner, run.layer)
        for batch, (x, span) in enumerate(zip(run.states, run.spans, strict=True)):
            check = (batches - 1 - batch) % _CHECKED == 0 and batches > 1
            refit.add(x, span, self._targets.target(batch), check=check, kv=self._kv(batch))
        for batch, (x, span) in enumerate(zip(self._alone.states, self._alone.spans, strict=True)):
            share = self._rules.prompt_share
            refit.add(x, span, self._targets.prompt_target(batch), check=False, share=share)
        weight, before, error = refit.solve(falls_back=self._rules.falls_back, text_share=self._text_share)
        if not math.isfinite(error):
            raise UserError(f"{self._stage} block {block}: its error is {error}; load the model in float32")
        self.refitted = f", relative squared error {before:.4f} -> {error:.4f}"
        self.changed[block] = {"mlp.down_proj.weight": weight}
        set_down(run.runner.layers[run.layer], weight)
        self._going = error < (1 - self._least_gain) * before

    def _kv(self, batch: int) -> LayerKV | None:
        source = self._sources[self._run.layer] if self._stage == "decode" else None
        return None if source is None else self._targets.kv(source, batch)
