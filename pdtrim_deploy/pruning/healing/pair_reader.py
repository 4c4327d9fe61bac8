"""Prefill as decode reads it: what a prefill stage is trained by where some of its blocks run for their KV alone.

The K and V of such blocks never reach prefill's own predictions, of which only that behind the last token is served.
All else that prefill does is read by decode, as KV. So prompts go through prefill, what follows them through decode
behind that KV, and gradients come back through it to prefill.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pdtrim_deploy.models.blockwise import Blockwise, CausalLM
from pdtrim_deploy.models.pd_run import PDRun
from pdtrim_deploy.pruning.healing.frozen_states import FrozenStates
from pdtrim_deploy.pruning.healing.reader import Reader
from pdtrim_deploy.pruning.pair import StagePair


class PairReader(Reader):
    """Hidden states behind the last token of a prompt (prefill's) and behind what follows (decode's); KV is whole.

    Args:
        model: the prefill stage that is trained; decode is that of `pair`, as it is.
        prompt: tokens of each prompt.
        judged_from: of these states, the first that counts; from 1 on, none is prefill's.
        recomputes: as in `StageReader`; of prefill's layers and of those that read their KV.
        shared: how many of the first layers are the dense model's in both stages, and do not learn: text goes through
            them once.
        folder: of what they make of text that is read again, as in `FrozenStates`.

    """

    def __init__(
        self,
        pair: StagePair,
        model: CausalLM,
        prompt: int,
        recomputes: bool = False,
        judged_from: int = 0,
        shared: int = 0,
        folder: Path | None = None,
    ) -> None:
        super().__init__(pair.model, model)
        self._shared, self._frozen = shared, FrozenStates(self.dense, shared, prompt - 1 + judged_from, folder)
        self._decode, self._sources, self._prompt = Blockwise(pair.stage("decode")), pair.plan.kv_sources, prompt
        self._adds = [pair.adds("prefill", block) for block in pair.plan.prefill_layers]
        self._recomputes, self._judged_from = recomputes, judged_from

    def hidden(self, ids: Tensor) -> Tensor:
        """As in `Reader`: `[batch, T - prompt - judged_from, hidden]`, to the last token but one."""
        run = PDRun(self.runner, self._decode, self._sources, [ids], self._prompt)
        if self._shared:
            states = self._frozen.shared(ids)
            for part, rows in ((run.prefill, slice(self._prompt)), (run.decode, slice(self._prompt, None))):
                part.states, part.layer = [states[:, rows]], self._shared
        while run.prefill.running:
            run = self._advanced(run)
        prompt, more = _states(run)
        return torch.cat((prompt[:, -1:], more.to(prompt.device)), dim=1)[:, self._judged_from :]

    def dense_hidden(self, ids: Tensor) -> Tensor:
        """As in `Reader`."""
        return self._frozen.judged(ids)

    def _advanced(self, run: PDRun) -> PDRun:
        """`run` past prefill's next layer."""
        ends: list[PDRun] = []

        def step(prompt: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
            end = run.fork()
            end.prefill.states, end.decode.states = [prompt], [more]
            end.advance(adds=self._adds[run.prefill.layer])
            if not ends:  # the first time; a layer that is run again for its gradients leaves nothing
                ends.append(end)
            return _states(end)

        if self._recomputes and torch.is_grad_enabled():
            prompt, more = checkpoint(step, *_states(run), use_reentrant=False, preserve_rng_state=False)  # type: ignore[misc]
        else:
            prompt, more = step(*_states(run))
        (end,) = ends
        end.prefill.states, end.decode.states = [prompt], [more]
        return end


def _states(run: PDRun) -> tuple[Tensor, Tensor]:
    """Of the prompt and of what follows it."""
    return run.prefill.states[0], run.decode.states[0]
