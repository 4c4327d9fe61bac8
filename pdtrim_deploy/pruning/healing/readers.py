"""Teacher and student as modules with one signature, as `modelopt.torch.distill` wants them.

Both are called with `(ids, prompt, held)`: int64 `[batch, T]`, how many of these are the prompt (0 for prefill), and
the prompt's KV that each KV layer of decode reads. Both give logits `[batch * (T - prompt), vocabulary]`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pdtrim_deploy.models.blockwise import Blockwise, CausalLM, LayerKV
from pdtrim_deploy.models.layer_run import LayerRun


class TeacherLogits(nn.Module):
    """The dense model: it reads prompt and all with its own KV, whatever is held."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model, self._runner = model, Blockwise(model)

    @torch.no_grad()
    def forward(self, ids: Tensor, prompt: int, held: list[LayerKV] | None) -> Tensor:
        """Logits of all but the prompt's tokens."""
        (hidden,) = LayerRun(self._runner, [ids]).finish()
        return self._runner.logits(hidden[:, prompt:].flatten(0, 1))


class StageLogits(nn.Module):
    """A stage model: as a whole model when `prompt` is 0, else what follows the prompt, on the KV that is held."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model, self._runner = model, Blockwise(model)

    def forward(self, ids: Tensor, prompt: int, held: list[LayerKV] | None) -> Tensor:
        """Logits of all but the prompt's tokens."""
        kvs = [[kv.fork()] for kv in self._runner.by_layer(held)] if held else None
        (hidden,) = LayerRun(self._runner, [ids[:, prompt:]], prompt).finish(kvs)
        return self._runner.logits(hidden.flatten(0, 1))


class PrefillKV(nn.Module):
    """The prefill stage: what it makes of a prompt, by KV layer of decode."""

    def __init__(self, model: CausalLM, layer_map: tuple[int, ...]) -> None:
        super().__init__()
        self._runner = Blockwise(model)
        self._sources = [self._runner.kv_layers[source] for source in layer_map]

    @torch.no_grad()
    def forward(self, prompts: Tensor) -> list[LayerKV]:
        """KV of `prompts`, int64 `[batch, tokens]`."""
        run, kvs = LayerRun(self._runner, [prompts]), [LayerKV() for _ in self._runner.layers]
        while run.layer <= self._sources[-1]:
            run.advance([kvs[run.layer]])
        return [kvs[source] for source in self._sources]
