"""Effects of every action and KV rule of every block on what a PD pair predicts, as vectors in KL's metric.

A change of the last hidden states is a vector (`Probe.change`) whose squared length is twice the KL; so KL of a plan is
half the squared length of the sum of its effects. A vector covers the first token, which prefill predicts, and those
that decode predicts from the KV handed over by the real pack and unpack. Effects are counted from a context, a choice
for every block; each feature is changed in one block at a time:

- prefill without the block, its attention or its MLP: what prefill hands over of all later blocks changes;
- decode without any of these;
- other rows, in the context's dtype, and other dtypes, of the context's rows.

That prefill leaves a block out changes later blocks alone: its own K and V are computed from the state before it. So
`skip` has one effect, whether decode reads that KV or not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pdtrim_deploy.joint.choice import DECODE, PREFILL, BlockChoice, Choices
from pdtrim_deploy.joint.solve import Floats
from pdtrim_deploy.kvchoice.base import Problem, Progress
from pdtrim_deploy.kvchoice.budget.probe import Probe
from pdtrim_deploy.kvchoice.budget.prompt_kv import PromptKV
from pdtrim_deploy.models.blockwise import LayerKV, Span
from pdtrim_deploy.models.oracle import PrefillState, to_pool
from pdtrim_deploy.models.sublayers import without_sublayer
from pdtrim_deploy.plan import KVSend, Sublayer
from pdtrim_deploy.plan.wire import WireDtype
from pdtrim_deploy.recipe.kv_cost import DRAWS
from pdtrim_deploy.recipe.target import MEASURED_AT_ONCE

_VERSION = 1
_LACKS: dict[str, Sublayer] = {"without_attention": "attention", "without_mlp": "mlp"}


@dataclass(frozen=True)
class JointEffects:
    """Inner products of effects, nats a token, by block and feature (`JointMeasure.features`).

    Attributes:
        context: what effects are counted from.
        error: twice its KL from the unpruned model.
        linear: float64 `[blocks, features]`.
        gram: float64 `[blocks, features, blocks, features]`.

    """

    context: Choices
    error: float
    linear: Floats
    gram: Floats


class JointMeasure:
    """Effects of `options` on the text of a problem, whose oracle has the unpruned model for both stages.

    Memory: of `batch` sequences prefill's state before every block and K and V of all blocks, and one probe.
    """

    def __init__(
        self,
        problem: Problem,
        options: Sequence[BlockChoice],
        progress: Progress,
        *,
        batch: int = MEASURED_AT_ONCE,
        draws: int = DRAWS,
    ) -> None:
        self.problem, self.options, self._progress = problem, tuple(options), progress
        self._runner, self._draws = problem.oracle.decode, draws
        self._sends = list(dict.fromkeys(option.send for option in self.options))
        self._rows = list(dict.fromkeys(map(_rows_of, self._sends)))
        self._dtypes: list[WireDtype] = list(dict.fromkeys(send.wire_dtype for send in self._sends))
        self._prefills = list(dict.fromkeys(option.prefill for option in self.options))
        self._decodes = list(dict.fromkeys(option.decode for option in self.options))
        self.features = len(PREFILL) + len(DECODE) + len(self._rows) + len(self._dtypes)
        self.dense: Choices = (BlockChoice(),) * problem.layers
        self._known: dict[Choices, JointEffects] = {}
        self._batches = [self._prepare(ids, seed) for seed, ids in enumerate(problem.sequences.split(batch))]

    @property
    def parts(self) -> Floats:
        """float64 `[options, features]`: of what features each option consists."""
        parts = np.zeros((len(self.options), self.features))
        for at, option in enumerate(self.options):
            parts[at, PREFILL.index(option.prefill)] = 1
            parts[at, len(PREFILL) + DECODE.index(option.decode)] = 1
            if option.attends:
                first = len(PREFILL) + len(DECODE)
                parts[at, first + self._rows.index(_rows_of(option.send))] = 1
                parts[at, first + len(self._rows) + self._dtypes.index(option.send.wire_dtype)] = 1
        return parts

    @torch.no_grad()
    def divergence(self, choices: Choices) -> float:
        """KL(unpruned || choices), nats a token, exact: of the first token and of decode's."""
        total, tokens = 0.0, 0
        step = self._runner.logits_step
        for part in self._batches:
            final = self._through(part, choices)
            for expected, row in zip(
                part.reference.flatten(0, 1).split(step), final.flatten(0, 1).split(step), strict=True
            ):
                log_probs, reference = (self._runner.logits(h).float().log_softmax(-1) for h in (row, expected))
                total += float((reference.exp() * (reference - log_probs)).sum(dtype=torch.float64))
                tokens += len(row)
        return total / tokens

    def about(self, context: Choices) -> JointEffects:
        """Effects of every feature of every block, with the other blocks as in `context`; measured once a context."""
        if context not in self._known:
            products = self._products(context).numpy()
            blocks, features = len(context), self.features
            gram = products[1:, 1:].reshape(blocks, features, blocks, features)
            linear = products[1:, 0].reshape(blocks, features)
            self._known[context] = JointEffects(context, float(products[0, 0]), linear, gram)
        return self._known[context]

    def _products(self, context: Choices) -> Tensor:
        if self.problem.memo is None:
            return self._multiplied(context)
        options = [[option.prefill, option.decode, option.send.model_dump()] for option in self.options]
        choices = [[choice.prefill, choice.decode, choice.send.model_dump()] for choice in context]
        key = ["joint", _VERSION, options, choices, len(self._batches), self._draws]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return self.problem.memo(name, lambda: self._multiplied(context))

    @torch.no_grad()
    def _multiplied(self, context: Choices) -> Tensor:
        size = 1 + len(context) * self.features
        products, tokens = torch.zeros(size, size, dtype=torch.float64), 0
        for number, part in enumerate(self._batches, 1):
            changes = self._changes(part, context, f"effects, batch {number}/{len(self._batches)}")
            products += (changes @ changes.T).double().cpu()
            tokens += part.reference.shape[0] * part.reference.shape[1]
        return products / tokens

    @torch.no_grad()
    def _prepare(self, ids: Tensor, seed: int) -> _Batch:
        n = self.problem.prompt_tokens
        hidden, span = self._runner.embed(ids[:, n:-1], n)
        part = _Batch(ids[:, :n], hidden, span, hidden, self.problem.seed + seed)
        part.reference = self._through(part, self.dense)
        self._progress(f"ran the unpruned model on {len(ids)} sequences")
        return part

    def _through(self, part: _Batch, choices: Choices) -> Tensor:
        """Last states `[batch, tokens, hidden]` of both stages: behind the prompt, then behind decode's tokens."""
        run = self._prefill(part, choices)
        return torch.cat([run.last, self._decode(part, choices, self._handed_over(run, choices))[-1]], dim=1)

    def _prefill(self, part: _Batch, choices: Choices, begin: _PrefillRun | None = None, block: int = 0) -> _PrefillRun:
        """Prefill from `block` on; what comes before it is that of `begin`."""
        if begin is None:
            hidden, span = self._runner.embed(part.prompts)
            begin = _PrefillRun([hidden], span, [])
        inputs, kvs = begin.inputs[: block + 1], begin.kvs[:block]
        for at in range(block, len(choices)):
            kv, action, state = LayerKV(pool=self.problem.oracle.fp8_pool), choices[at].prefill, inputs[-1]
            whole = action in ("keep", "without_mlp")
            student = self._student(at, action) if whole else None
            after = self._runner.block(at, state, begin.span, kv, student)
            if action == "skip":
                after = state
            elif not whole:  # K and V are those that the block's attention would have had
                after = self._runner.block(at, state, begin.span, None, self._student(at, action))
            kvs.append(kv)
            inputs.append(after)
        return _PrefillRun(inputs, begin.span, kvs)

    def _state(self, run: _PrefillRun) -> PrefillState:
        dtype, home = getattr(torch, self.problem.oracle.plan.model.row_dtype), self._runner.home
        keys, values = (
            tuple(to_pool(side, dtype, home) for side in sides if side is not None)
            for sides in zip(*((kv.keys, kv.values) for kv in run.kvs), strict=True)
        )
        batch, tokens = run.inputs[0].shape[:2]
        return PrefillState(batch, tokens, keys, values, self._runner.logits(run.last[:, 0]))

    def _handed_over(self, run: _PrefillRun, choices: Choices) -> list[LayerKV]:
        """What decode is sent of every block, in the choices' rows and dtypes."""
        sends = tuple(choice.send for choice in choices)
        return self.problem.oracle.with_kv(sends).hand_over(self._state(run))

    def _decode(
        self,
        part: _Batch,
        choices: Choices,
        kvs: Sequence[LayerKV | None],
        hidden: Tensor | None = None,
        block: int = 0,
    ) -> list[Tensor]:
        """States before `block` and before each that follows it, and behind the last; `kvs` of blocks from 0 on."""
        states = [part.hidden if hidden is None else hidden]
        for at in range(block, len(choices)):
            states.append(self._step(part, at, choices[at].decode, states[-1], kvs[at]))
        return states

    def _step(self, part: _Batch, block: int, action: str, hidden: Tensor, kv: LayerKV | None) -> Tensor:
        if action == "drop":
            return hidden
        read = None if action == "without_attention" or kv is None else kv.fork()
        return self._runner.block(block, hidden, part.span, read, self._student(block, action))

    def _student(self, block: int, action: str) -> torch.nn.Module | None:
        lacks = _LACKS.get(action)
        return None if lacks is None else without_sublayer(self._runner.layers[block], lacks)

    def _changes(self, part: _Batch, context: Choices, name: str) -> Tensor:
        """float32 `[1 + blocks * features, coordinates]`: the context's error, then the effects."""
        probe = Probe(self._runner, part.reference, self._draws, part.seed)
        run = self._prefill(part, context)
        prompt_kv = PromptKV(
            self.problem.oracle, self._state(run), tuple(dict.fromkeys(("native", *self._dtypes))), self.problem.work
        )

        def sent(block: int, send: KVSend) -> LayerKV:
            rule = self.problem.rule(block, send)
            return prompt_kv.read(rule.wire_dtype, block, rule.row_ranges(self.problem.prompt_tokens))

        kvs: list[LayerKV | None] = [
            sent(b, choice.send) if choice.attends else None for b, choice in enumerate(context)
        ]
        states = self._decode(part, context, kvs)

        def change(last: Tensor, first: Tensor = run.last) -> Tensor:
            return probe.change(torch.cat([first, last], dim=1))

        def decoded(block: int, action: str, kv: LayerKV | None) -> Tensor:
            """The change of a decode that does otherwise in one block."""
            hidden = self._step(part, block, action, states[block], kv)
            return change(self._decode(part, context, kvs, hidden, block + 1)[-1])

        error = change(states[-1])
        changes = torch.zeros(1 + len(context) * self.features, len(error), device=error.device)
        changes[0] = error
        for block, choice in enumerate(context):
            row = 1 + block * self.features
            for action in (action for action in self._prefills if action != choice.prefill):
                other = _with(context, block, BlockChoice(action, choice.decode, choice.send))
                prefill = self._prefill(part, other, run, block)
                held = self._handed_over(prefill, other)
                last = self._decode(part, context, held, states[block + 1], block + 1)[-1]
                changes[row + PREFILL.index(action)] = change(last, prefill.last) - error
            row += len(PREFILL)
            # Rules are counted from the context's own or, where it does not read KV, from a decode that reads it whole.
            about = choice if choice.attends else BlockChoice(choice.prefill, "keep", KVSend())
            base = error if choice.attends else decoded(block, "keep", sent(block, KVSend()))
            for does in (does for does in self._decodes if does != choice.decode):
                reads = sent(block, about.send)
                known = base if does == "keep" and not choice.attends else decoded(block, does, reads)
                changes[row + DECODE.index(does)] = known - error
            row += len(DECODE)
            for at, send in self._rules_about(block, about.send):
                changes[row + at] = decoded(block, about.decode, sent(block, send)) - base
            self._progress(f"{name}: block {block + 1}/{len(context)}")
        return changes

    def _rules_about(self, block: int, send: KVSend) -> list[tuple[int, KVSend]]:
        """Other rows, then other dtypes, than `send` has; each with its place among both."""
        rule = self.problem.rule
        rows = [(at, row.model_copy(update={"wire_dtype": send.wire_dtype})) for at, row in enumerate(self._rows)]
        dtypes = enumerate(self._dtypes, len(self._rows))
        rules = rows + [(at, send.model_copy(update={"wire_dtype": dtype})) for at, dtype in dtypes]
        return [(at, other) for at, other in rules if rule(block, other) != rule(block, send)]


@dataclass
class _Batch:
    prompts: Tensor
    hidden: Tensor
    span: Span
    reference: Tensor
    seed: int


@dataclass(frozen=True)
class _PrefillRun:
    """`inputs` of each block that ran, and what the last put out; K and V of each."""

    inputs: list[Tensor]
    span: Span
    kvs: list[LayerKV]

    @property
    def last(self) -> Tensor:
        """`[batch, 1, hidden]`, which predicts the first token."""
        return self.inputs[-1][:, -1:]


def _with(choices: Choices, block: int, choice: BlockChoice) -> Choices:
    return (*choices[:block], choice, *choices[block + 1 :])


def _rows_of(send: KVSend) -> KVSend:
    return send.model_copy(update={"wire_dtype": "native"})
