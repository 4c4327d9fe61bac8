"""A stage over text, as PD serves it.

Prefill reads text as a whole model does. Decode reads what follows a prompt, whose KV it is handed; the dense model
reads prompt and all with its own KV.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pdtrim_deploy.models.blockwise import Blockwise, CausalLM
from pdtrim_deploy.models.layer_kv import LayerKV, Span
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.plan import Stage
from pdtrim_deploy.pruning.healing.reader import Reader
from pdtrim_deploy.pruning.pair import StagePair


@dataclass(frozen=True)
class PromptKV:
    """Prompts of so many tokens, whose KV reaches decode's KV layers as `held` gives it: int64 `[batch, tokens]` ->."""

    prompt_tokens: int
    held: Callable[[Tensor], list[LayerKV]]


class PrefillKV:
    """What a pair's prefill makes of a prompt, its tail's KV too, by KV layer of decode."""

    def __init__(self, pair: StagePair) -> None:
        self._oracle = PDOracle(pair.stage("prefill"), pair.stage("decode"), pair.plan)
        kv_layers = Blockwise(self._oracle.prefill_model).kv_layers
        self._sources = [kv_layers[source] for source in pair.plan.layer_map]

    @torch.no_grad()
    def __call__(self, prompts: Tensor) -> list[LayerKV]:
        """KV of `prompts`, int64 `[batch, tokens]`."""
        runs, kvs = self._oracle.prompt_runs([prompts]), dict[int, LayerKV]()
        while (layer := runs[-1].layer) <= self._sources[-1]:
            kvs[layer] = LayerKV()
            for run in runs:
                run.advance([kvs[layer]])
        return [kvs[source] for source in self._sources]


class StageReader(Reader):
    """Hidden states and divergences of `stage`, whose weights are those of `model`.

    Args:
        prompt_kv: None for a stage that reads all of the text itself.
        recomputes: gradient checkpointing: of each layer the input alone is kept, and the layer run again for its
            gradients.

    """

    def __init__(
        self, pair: StagePair, stage: Stage, model: CausalLM, prompt_kv: PromptKV | None, recomputes: bool = False
    ) -> None:
        super().__init__(pair.model, model)
        self.spans, self._prompt_kv, self._recomputes = pair.spans(stage), prompt_kv, recomputes
        self.prompt = prompt_kv.prompt_tokens if prompt_kv else 0

    def begin(self, ids: Tensor) -> tuple[Tensor, Span, list[LayerKV] | None]:
        """The stage's input of its first layer for what follows the prompt, and the KV that each layer reads."""
        held = self.runner.by_layer(self._prompt_kv.held(ids[:, : self.prompt])) if self._prompt_kv else None
        hidden, span = self.runner.embed(ids[:, self.prompt :], self.prompt)
        return hidden, span, held

    def layer(self, number: int, hidden: Tensor, span: Span, held: list[LayerKV] | None) -> Tensor:
        """Output of one layer; `held` stays as it is."""
        return self.runner.block(number, hidden, span, held[number].fork() if held else None)

    def hidden(self, ids: Tensor) -> Tensor:
        """As in `Reader`: of what follows the prompt, `[batch, T - prompt, hidden]`."""
        state, span, held = self.begin(ids)
        for number in range(len(self.runner.layers)):
            if self._recomputes and torch.is_grad_enabled():
                state = checkpoint(  # type: ignore[assignment]
                    self.layer, number, state, span, held, use_reentrant=False, preserve_rng_state=False
                )
            else:
                state = self.layer(number, state, span, held)
        return state

    @torch.no_grad()
    def dense_hidden(self, ids: Tensor) -> Tensor:
        """As in `Reader`."""
        (hidden,) = LayerRun(self.dense, [ids]).finish()
        return hidden[:, self.prompt :]
