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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pdtrim_deploy.joint.choice import DECODE, PREFILL, BlockChoice, Choices
from pdtrim_deploy.joint.choice_batch import ChoiceBatch
from pdtrim_deploy.joint.solve import Floats
from pdtrim_deploy.kvchoice.base import Problem, Progress
from pdtrim_deploy.kvchoice.budget.option_parts import OptionParts
from pdtrim_deploy.kvchoice.budget.probe import Probe
from pdtrim_deploy.kvchoice.budget.products import effect_products, summed_kl
from pdtrim_deploy.kvchoice.budget.prompt_kv import PromptKV
from pdtrim_deploy.models.layer_kv import LayerKV
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.recipe.kv_cost import DRAWS
from pdtrim_deploy.recipe.target import MEASURED_AT_ONCE

_VERSION = 1


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
        self._draws, self._sent = draws, OptionParts.of([option.send for option in self.options])
        self._prefills = list(dict.fromkeys(option.prefill for option in self.options))
        self._decodes = list(dict.fromkeys(option.decode for option in self.options))
        self.features = len(PREFILL) + len(DECODE) + len(self._sent)
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
                for place in self._sent.places(option.send):
                    parts[at, len(PREFILL) + len(DECODE) + place] = 1
        return parts

    @torch.no_grad()
    def divergence(self, choices: Choices) -> float:
        """KL(unpruned || choices), nats a token, exact: of the first token and of decode's."""
        runner = self.problem.oracle.decode
        total = sum(
            summed_kl(runner, batch.reference.flatten(0, 1), batch.through(choices).flatten(0, 1))
            for batch in self._batches
        )
        return total / sum(batch.tokens for batch in self._batches)

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
        options = [[option.prefill, option.decode, option.send.model_dump()] for option in self.options]
        choices = [[choice.prefill, choice.decode, choice.send.model_dump()] for choice in context]
        key = ["joint", _VERSION, options, choices, len(self._batches), self._draws]
        count = len(self._batches)
        parts = [
            (partial(self._changes, batch, context, f"effects, batch {number}/{count}"), batch.tokens)
            for number, batch in enumerate(self._batches, 1)
        ]
        return effect_products(self.problem, key, parts)

    @torch.no_grad()
    def _prepare(self, ids: Tensor, seed: int) -> ChoiceBatch:
        batch = ChoiceBatch(self.problem, ids, self.problem.seed + seed)
        self._progress(f"ran the unpruned model on {len(ids)} sequences")
        return batch

    @torch.no_grad()
    def _changes(self, batch: ChoiceBatch, context: Choices, name: str) -> Tensor:
        """float32 `[1 + blocks * features, coordinates]`: the context's error, then the effects."""
        problem = self.problem
        probe = Probe(problem.oracle.decode, batch.reference, self._draws, batch.seed)
        run = batch.prefill(context)
        dtypes = tuple(dict.fromkeys(("native", *self._sent.dtypes)))
        prompt_kv = PromptKV(problem.oracle, batch.state(run), dtypes, problem.work)

        def sent(block: int, send: KVSend) -> LayerKV:
            rule = problem.rule(block, send)
            return prompt_kv.read(rule.wire_dtype, block, rule.row_ranges(problem.prompt_tokens))

        kvs: list[LayerKV | None] = [
            sent(b, choice.send) if choice.attends else None for b, choice in enumerate(context)
        ]
        states = batch.decode(context, kvs)

        def change(last: Tensor, first: Tensor = run.last) -> Tensor:
            return probe.change(torch.cat([first, last], dim=1))

        def decoded(block: int, action: str, kv: LayerKV | None) -> Tensor:
            """The change of a decode that does otherwise in one block."""
            hidden = batch.step(block, action, states[block], kv)
            return change(batch.decode(context, kvs, hidden, block + 1)[-1])

        error = change(states[-1])
        changes = torch.zeros(1 + len(context) * self.features, len(error), device=error.device)
        changes[0] = error
        for block, choice in enumerate(context):
            row = 1 + block * self.features
            for action in (action for action in self._prefills if action != choice.prefill):
                other = _with(context, block, BlockChoice(action, choice.decode, choice.send))
                prefill = batch.prefill(other, run, block)
                held = batch.handed_over(prefill, other)
                last = batch.decode(context, held, states[block + 1], block + 1)[-1]
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
            for at, send in self._sent.others(problem, block, about.send):
                changes[row + at] = decoded(block, about.decode, sent(block, send)) - base
            self._progress(f"{name}: block {block + 1}/{len(context)}")
        return changes


def _with(choices: Choices, block: int, choice: BlockChoice) -> Choices:
    return (*choices[:block], choice, *choices[block + 1 :])
