"""Decode of a batch of sequences, layer by layer, whatever KV each layer is sent."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pdtrim_deploy.kvchoice.base import Problem
from pdtrim_deploy.kvchoice.budget.prompt_kv import PromptKV
from pdtrim_deploy.models.layer_kv import LayerKV, Span
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.plan.wire import WireDtype


class DecodeBatch:
    """The continuations of a batch `ids`, whose prompts are prefilled once; their KV is in a file.

    Args:
        dtypes: wire dtypes to send in, besides native.
        spans: by number of alternatives side by side, where they stand; shared by all batches of a problem.

    Attributes:
        hidden: input of the first KV layer, `[batch, tokens, hidden]`.
        reference: output of the last layer where all KV is sent, native.

    """

    def __init__(
        self, problem: Problem, ids: Tensor, seed: int, dtypes: Sequence[WireDtype], spans: dict[int, Span]
    ) -> None:
        oracle, n = problem.oracle, problem.prompt_tokens
        self.seed, self._problem, self._spans = seed, problem, spans
        sent = tuple(dict.fromkeys(("native", *dtypes)))
        self._prompt_kv = PromptKV(oracle, oracle.prefill(ids[:, :n]), sent, problem.work)
        self.hidden, span = oracle.decode.embed(ids[:, n:-1], n)
        self._spans.setdefault(1, span)
        for layer in range(oracle.decode.kv_layers[0]):
            self.hidden = oracle.decode.block(layer, self.hidden, span)
        self.reference = self.forward((KVSend(),) * problem.layers)[-1]

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.reference.shape[0] * self.reference.shape[1]

    def forward(self, plan: Sequence[KVSend]) -> list[Tensor]:
        """The input of each KV layer, then the output of the last layer."""
        outputs = [self.hidden]
        for layer, send in enumerate(plan):
            outputs.append(self.through(layer, outputs[-1], self.kv(layer, send)))
        return outputs

    def through(self, layer: int, hidden: Tensor, kv: LayerKV, branches: int = 1) -> Tensor:
        """Through a KV layer, and those without attention that follow it; `branches` as in `Blockwise.embed`."""
        decode, span = self._problem.oracle.decode, self._span_of(branches)
        first, stop = [*decode.kv_layers, len(decode.layers)][layer : layer + 2]
        hidden = decode.block(first, hidden, span, kv)
        for after in range(first + 1, stop):
            hidden = decode.block(after, hidden, span)
        return hidden

    def kv(self, layer: int, send: KVSend) -> LayerKV:
        """What decode holds of the prompts when they are sent so."""
        ranges = self._problem.rule(layer, send).row_ranges(self._problem.prompt_tokens)
        return self._prompt_kv.read(send.wire_dtype, layer, ranges)

    def _span_of(self, branches: int) -> Span:
        """Of so many alternatives side by side; the same for all batches, and computed once."""
        if branches not in self._spans:
            like = self.hidden.repeat(1, branches, 1)
            self._spans[branches] = self._problem.oracle.decode.span(like, self._problem.prompt_tokens, branches)
        return self._spans[branches]
