"""What a search minimises, opened up between blocks so that hidden states can be kept and reused."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from pdtrim_deploy.models.blockwise import Blockwise, CausalLM
from pdtrim_deploy.models.layer_kv import LayerKV, Span
from pdtrim_deploy.models.layer_run import LayerRun
from pdtrim_deploy.models.sublayers import without_sublayer
from pdtrim_deploy.pruning.solution import NOTHING, Op, Solution, missing_in
from pdtrim_deploy.pruning.vocabulary_sample import VocabularySample


class Objective(Protocol):
    """A calibration loss in `batches` parts. Hidden states are `[sequences, tokens, hidden]`.

    Attributes:
        forced: what every solution loses.
        block_forwards: cost so far: blocks run, times sequences of the batch.

    """

    forced: Solution
    blocks: int
    batches: int
    block_forwards: int

    def start(self, batch: int) -> Tensor:
        """Input of block 0."""
        ...

    def run(self, batch: int, op: Op, hidden: Tensor) -> Tensor:
        """Output of that block or student for that input, which is left unchanged."""
        ...

    def losses(self, batch: int, hidden: Tensor, sample: VocabularySample | None = None) -> Tensor:
        """float32 `[sequences, scored]`: loss in nats of each scored token, from the last block's output.

        About that, where a `sample` stands for the vocabulary.
        """
        ...

    def sample(self, batch: int, hidden: Tensor) -> VocabularySample | None:
        """What may stand for the vocabulary on a batch, by the last block's output without `forced`; None: nothing."""
        ...


class StudentLayers(Protocol):
    """Students by their pair, made when first asked for."""

    def layer(self, pair: tuple[int, int]) -> nn.Module:
        """A decoder layer that stands at `pair[0]` and reads that block's prompt KV."""
        ...


@dataclass(frozen=True)
class _Batch:
    first: Tensor
    span: Span
    targets: Tensor
    prompt_kv: dict[int, LayerKV]


class NextTokenLoss:
    """NLL of calibration text, int64 `[S, T]`: of the pruned model alone, or of decode behind a PD hand-over.

    With `prompt_tokens` of 0 the model under search reads everything and tokens 1 .. T-1 are scored. Otherwise the
    prompt is run once, by the prefill model, whose KV (whole) each block of decode then reads; decode reads the
    rest and is scored on tokens `prompt_tokens + 1` .. T-1. (Token `prompt_tokens` is prefill's own.)

    Args:
        prefill: what prefill loses; no search over this loss may run a block that it removed, nor the second of a pair.
        students: what runs in place of pairs; None where there are none.
        batch: most sequences in a batch; batches grow up to it, so that a first look at a candidate is cheap.

    """

    def __init__(
        self,
        model: CausalLM,
        ids: Tensor,
        prompt_tokens: int = 0,
        prefill: Solution = NOTHING,
        students: StudentLayers | None = None,
        batch: int = 8,
    ) -> None:
        self._runner, self._students = Blockwise(model), students
        self.blocks, self.block_forwards = len(self._runner.layers), 0
        first = 1 if ids.shape[1] - prompt_tokens - 1 >= _ENOUGH else 2
        self._parts = ids.split(_growing(len(ids), batch, first))
        self._prompt_tokens, self.forced, self.batches = prompt_tokens, prefill, len(self._parts)

    @cached_property
    def _batches(self) -> list[_Batch]:
        """Made when first asked for: where others evaluate, or an earlier run has, prompts need not be read."""
        at = self._prompt_tokens
        with torch.no_grad():
            return [
                _Batch(*self._runner.embed(ids[:, at:-1], at), ids[:, at + 1 :], kv)
                for ids, kv in zip(self._parts, self._prompt_kv(), strict=True)
            ]

    def _prompt_kv(self) -> list[dict[int, LayerKV]]:
        """Prefill's, of each batch; all go through together: a block that is read from disk comes once."""
        prompt_kv: list[dict[int, LayerKV]] = [{} for _ in self._parts]
        if not self._prompt_tokens:
            return prompt_kv
        run = LayerRun(self._runner, [ids[:, : self._prompt_tokens] for ids in self._parts])
        for op in self.forced.route(self.blocks):
            kvs = [LayerKV() for _ in self._parts]
            run.advance(kvs, layer=op[0], student=self._student(op))
            for held, kv, ids in zip(prompt_kv, kvs, self._parts, strict=True):
                held[op[0]] = kv
                self.block_forwards += len(ids)
        return prompt_kv

    def start(self, batch: int) -> Tensor:
        """Input of block 0."""
        return self._batches[batch].first

    @torch.no_grad()
    def run(self, batch: int, op: Op, hidden: Tensor) -> Tensor:
        """Output of a layer, whose queries see the prompt's KV, if any, and causally each other."""
        self.block_forwards += len(hidden)
        part = self._batches[batch]
        kv = part.prompt_kv[op[0]].fork() if part.prompt_kv else None
        return self._runner.block(op[0], hidden, part.span, kv, self._student(op))

    def _student(self, op: Op) -> nn.Module | None:
        """What runs in the block's place, if it does not itself."""
        if len(op) == 1:
            return None
        if (sublayer := missing_in(op)) is not None:
            return without_sublayer(self._runner.layers[op[0]], sublayer)
        assert self._students is not None, "a pair is distilled but there are no students"
        return self._students.layer((op[0], op[1]))

    @torch.no_grad()
    def losses(self, batch: int, hidden: Tensor, sample: VocabularySample | None = None) -> Tensor:
        """float32 `[sequences, scored]`: NLL of each scored token; about that, with a sample of the vocabulary."""
        targets = self._batches[batch].targets
        if sample is not None:
            return -sample.logprobs(self._runner, hidden, targets)
        return -self._runner.logprobs(hidden, targets)

    def sample(self, batch: int, hidden: Tensor) -> VocabularySample | None:
        """The batch's own tokens, those that are likely without `forced`, and some others."""
        return VocabularySample.of(self._runner, hidden, self._batches[batch].targets)


_ENOUGH = 225  # scored tokens that make 8 units of 32, the last perhaps shorter: enough for a race (`search.racing`)


def _growing(sequences: int, most: int, first: int) -> list[int]:
    """Batch sizes: `first`, and then each as large as all before it together: 1, 1, 2, 4, ..."""
    sizes = list[int]()
    while (done := sum(sizes)) < sequences:
        sizes.append(min(max(first, done), most, sequences - done))
    return sizes
