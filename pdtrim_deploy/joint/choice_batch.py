"""Both stages on a batch of sequences, block by block, with a choice for every block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdtrim_deploy.joint.choice import BlockChoice, Choices
from pdtrim_deploy.kvchoice.base import Problem
from pdtrim_deploy.models.layer_kv import LayerKV, Span
from pdtrim_deploy.models.oracle import PrefillState, to_pool
from pdtrim_deploy.models.sublayers import without_sublayer
from pdtrim_deploy.plan import Sublayer

_LACKS: dict[str, Sublayer] = {"without_attention": "attention", "without_mlp": "mlp"}


@dataclass(frozen=True)
class PrefillRun:
    """`inputs` of each block that ran, and what the last put out; K and V of each."""

    inputs: list[Tensor]
    span: Span
    kvs: list[LayerKV]

    @property
    def last(self) -> Tensor:
        """`[batch, 1, hidden]`, which predicts the first token."""
        return self.inputs[-1][:, -1:]


class ChoiceBatch:
    """Sequences `ids`, of which prefill reads the prompts and decode the rest.

    Attributes:
        reference: last states of the unpruned model, as `through` gives them.

    """

    def __init__(self, problem: Problem, ids: Tensor, seed: int) -> None:
        self.seed, self._problem, self._runner = seed, problem, problem.oracle.decode
        n = problem.prompt_tokens
        self._prompts = ids[:, :n]
        self._hidden, self._span = self._runner.embed(ids[:, n:-1], n)
        self.reference = self.through((BlockChoice(),) * problem.layers)

    @property
    def tokens(self) -> int:
        """Predicted, of all sequences."""
        return self.reference.shape[0] * self.reference.shape[1]

    def through(self, choices: Choices) -> Tensor:
        """Last states `[batch, tokens, hidden]` of both stages: behind the prompt, then behind decode's tokens."""
        run = self.prefill(choices)
        return torch.cat([run.last, self.decode(choices, self.handed_over(run, choices))[-1]], dim=1)

    def prefill(self, choices: Choices, begin: PrefillRun | None = None, block: int = 0) -> PrefillRun:
        """Prefill from `block` on; what comes before it is that of `begin`."""
        if begin is None:
            hidden, span = self._runner.embed(self._prompts)
            begin = PrefillRun([hidden], span, [])
        inputs, kvs = begin.inputs[: block + 1], begin.kvs[:block]
        for at in range(block, len(choices)):
            kv, action, state = LayerKV(pool=self._problem.oracle.fp8_pool), choices[at].prefill, inputs[-1]
            whole = action in ("keep", "without_mlp")
            student = self._student(at, action) if whole else None
            after = self._runner.block(at, state, begin.span, kv, student)
            if action == "skip":
                after = state
            elif not whole:  # K and V are those that the block's attention would have had
                after = self._runner.block(at, state, begin.span, None, self._student(at, action))
            kvs.append(kv)
            inputs.append(after)
        return PrefillRun(inputs, begin.span, kvs)

    def state(self, run: PrefillRun) -> PrefillState:
        """What the oracle's prefill would have handed over."""
        dtype, home = getattr(torch, self._problem.oracle.plan.model.row_dtype), self._runner.home
        keys, values = (
            tuple(to_pool(side, dtype, home) for side in sides if side is not None)
            for sides in zip(*((kv.keys, kv.values) for kv in run.kvs), strict=True)
        )
        batch, tokens = run.inputs[0].shape[:2]
        return PrefillState(batch, tokens, keys, values, self._runner.logits(run.last[:, 0]))

    def handed_over(self, run: PrefillRun, choices: Choices) -> list[LayerKV]:
        """What decode is sent of every block, in the choices' rows and dtypes."""
        sends = tuple(choice.send for choice in choices)
        return self._problem.oracle.with_kv(sends).hand_over(self.state(run))

    def decode(
        self, choices: Choices, kvs: Sequence[LayerKV | None], hidden: Tensor | None = None, block: int = 0
    ) -> list[Tensor]:
        """States before `block` and before each that follows it, and behind the last; `kvs` of blocks from 0 on."""
        states = [self._hidden if hidden is None else hidden]
        for at in range(block, len(choices)):
            states.append(self.step(at, choices[at].decode, states[-1], kvs[at]))
        return states

    def step(self, block: int, action: str, hidden: Tensor, kv: LayerKV | None) -> Tensor:
        """Decode through one block, which does `action`."""
        if action == "drop":
            return hidden
        read = None if action == "without_attention" or kv is None else kv.fork()
        return self._runner.block(block, hidden, self._span, read, self._student(block, action))

    def _student(self, block: int, action: str) -> torch.nn.Module | None:
        lacks = _LACKS.get(action)
        return None if lacks is None else without_sublayer(self._runner.layers[block], lacks)
