"""A prompt through prefill, its continuation through decode behind that KV, and the loss of what is said there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy

import torch
from torch import Tensor

from pdtrim_deploy.models.blockwise import Blockwise, pick
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.models.layer_run import LayerRun


def continuation_logprobs(first: Tensor, decode: Blockwise, hidden: Tensor, continuation: Tensor) -> Tensor:
    """float32 `[batch, T]`: log-probability of each token of `continuation`, int64 `[batch, T]`, as PD serves it.

    The first token is judged by prefill's logits behind the prompt, `first` `[batch, vocabulary]`; the others by
    decode's last states `hidden` `[batch, T - 1, hidden]`.
    """
    judged = pick(first, continuation[:, 0])[:, None]
    if continuation.shape[1] == 1:
        return judged
    return torch.cat((judged, decode.logprobs(hidden, continuation[:, 1:])), dim=1)


def sequence_nll(logprobs: Tensor) -> Tensor:
    """float64 `[batch]`: each sequence's loss, nats a token, of log-probabilities `[batch, T]`."""
    return -logprobs.double().mean(1)


def mean_nll(parts: Iterable[Tensor]) -> float:
    """Nats a token over log-probabilities `[batch, T]` of equal T."""
    return float(torch.cat([sequence_nll(part) for part in parts]).mean())


class PDRun:
    """Batches on their way through both stages, prefill ahead by what decode reads next; all KV travels whole.

    A layer's KV is kept no longer than it is read.

    Args:
        sources: for each layer of decode, the layer of prefill whose prompt KV it reads; None for one without
            attention (`PDPlan.kv_sources`).
        parts: int64 `[batch, T]` each; the first `prompt_tokens` tokens are the prompt.

    """

    def __init__(
        self,
        prefill: Blockwise,
        decode: Blockwise,
        sources: tuple[int | None, ...],
        parts: Sequence[Tensor],
        prompt_tokens: int,
    ) -> None:
        self._sources, self._continuations = sources, [ids[:, prompt_tokens:] for ids in parts]
        self.prefill = LayerRun(prefill, [ids[:, :prompt_tokens] for ids in parts])
        self.decode = LayerRun(decode, [ids[:, :-1] for ids in self._continuations], prompt_tokens)

    def fork(self) -> PDRun:
        """The same, to go on by itself."""
        run = copy(self)
        run.prefill, run.decode = self.prefill.fork(), self.decode.fork()
        return run

    def advance(self, *, adds: bool = True) -> None:
        """Through prefill's next layer (for its K and V alone, unless it `adds`), and what of decode reads them."""
        layer, kvs = self.prefill.layer, [LayerKV() for _ in self.prefill.states]
        self.prefill.advance(kvs, adds=adds)
        while self.decode.running and (source := self._sources[self.decode.layer]) in (None, layer):
            self.decode.advance(None if source is None else kvs)

    def logprobs(self) -> list[Tensor]:
        """Go to the end: float32 `[batch, T - prompt_tokens]` of each batch, as `continuation_logprobs`."""
        while self.prefill.running:
            self.advance()
        return [
            continuation_logprobs(self.prefill.runner.logits(prompt[:, -1]), self.decode.runner, hidden, continuation)
            for prompt, hidden, continuation in zip(
                self.prefill.states, self.decode.states, self._continuations, strict=True
            )
        ]
