"""The effect of each way of sending each layer's KV on decode's predictions, and how effects add up.

With effects as vectors (`Probe.change`), KL(dense || plan) is half the squared length of their sum. So one pass over
layers and ways measures both the harm of each way and, in the Gram matrix, how any two strengthen or cancel each other.
Effects are measured around a context, the plan of all other layers, because what one layer cannot read, another may
still provide; the search measures them again around the solver's plan.

To save time, the effect of a way is the effect of its rows (in the context's dtype) plus that of its dtype (on the
context's rows): rows and dtypes are measured separately, not every pair of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from pdtrim_deploy.kvchoice.base import Problem, Progress
from pdtrim_deploy.kvchoice.budget.probe import Probe
from pdtrim_deploy.kvchoice.budget.prompt_kv import PromptKV
from pdtrim_deploy.models.blockwise import LayerKV, Span
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.plan.wire import WireDtype
from pdtrim_deploy.recipe.kv_cost import BATCH, DRAWS, SIDE_BY_SIDE


@dataclass(frozen=True)
class Effects:
    """Inner products of effects, nats a token; KL of a plan is `(error + sum of its effects)^2 / 2`.

    Attributes:
        context: the plan that effects are counted from; an option that the context has already has no effect.
        options: the options of each layer, in the order of `gram`'s columns.
        error: the context's own squared length: twice its KL from dense.
        linear: float64 `[layers, options]`, effect times context's error.
        gram: float64 `[layers, options, layers, options]`, effect times effect.

    """

    context: tuple[KVSend, ...]
    options: tuple[KVSend, ...]
    error: float
    linear: Tensor
    gram: Tensor


class Measure:
    """Effects of `options` on one problem; data that all contexts share is computed once.

    Memory: one batch's KV of all layers during prefill, then of one layer, a probe, and `problem.state_bytes` of hidden
    states that go through the model side by side. Data that grows with the number of sequences is in files in
    `problem.work`.
    """

    def __init__(
        self, problem: Problem, options: Sequence[KVSend], progress: Progress, *, batch: int = BATCH, draws: int = DRAWS
    ) -> None:
        self.problem, self.options, self._progress = problem, tuple(options), progress
        self._rows = list(dict.fromkeys(map(_rows_of, self.options)))
        self._dtypes: list[WireDtype] = list(dict.fromkeys(o.wire_dtype for o in self.options))
        self._sizes = [batch, draws]
        self._known: dict[tuple[KVSend, ...], Effects] = {}
        self._spans: dict[int, Span] = {}
        parts = enumerate(problem.sequences.split(batch), problem.seed)
        self._batches = [self._prepare(ids, seed) for seed, ids in parts]

    @torch.no_grad()
    def divergence(self, plan: tuple[KVSend, ...]) -> float:
        """KL(dense || plan), nats a token, exact."""
        total, tokens = 0.0, 0
        step = self.problem.oracle.decode.logits_step
        for part in self._batches:
            hidden = self._forward(part, plan)[-1]
            for expected, row in zip(part.reference, hidden, strict=True):
                total += sum(map(self._kl, expected.split(step), row.split(step)))
                tokens += len(row)
        return total / tokens

    def _kl(self, expected: Tensor, hidden: Tensor) -> float:
        """KL in nats, summed over last states `[tokens, hidden]` of the dense plan and of another."""
        log_probs, reference = (
            self.problem.oracle.decode.logits(h).float().log_softmax(-1) for h in (hidden, expected)
        )
        return float((reference.exp() * (reference - log_probs)).sum(dtype=torch.float64))

    def about(self, context: tuple[KVSend, ...]) -> Effects:
        """Effects of every option of every layer, with the other layers as in `context`; measured once per context."""
        if context not in self._known:
            self._known[context] = self._measured(context)
        return self._known[context]

    def _measured(self, context: tuple[KVSend, ...]) -> Effects:
        layers, kinds = len(context), len(self._rows) + len(self._dtypes)
        products = self._products(context)
        # option = its rows + its dtype; the context's own rows and dtype are no change
        parts = torch.zeros(len(self.options), kinds, dtype=torch.float64)
        for at, option in enumerate(self.options):
            parts[at, self._rows.index(_rows_of(option))] = 1
            parts[at, len(self._rows) + self._dtypes.index(option.wire_dtype)] = 1
        effects = torch.block_diag(*[parts] * layers)
        gram = (effects @ products[1:, 1:] @ effects.T).view(layers, len(self.options), layers, len(self.options))
        linear = (effects @ products[1:, 0]).view(layers, len(self.options))
        return Effects(context, self.options, float(products[0, 0]), linear, gram)

    def _products(self, context: tuple[KVSend, ...]) -> Tensor:
        """Gram matrix, float64, of the context's error and each layer's rows and dtypes; stored in `memo`."""
        if self.problem.memo is None:
            return self._multiplied(context)
        rows = [[send.mode, send.n_first, send.n_last, *[send.share] * bool(send.share)] for send in self._rows]
        key = [rows, self._dtypes, [send.model_dump() for send in context], self._sizes]
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return self.problem.memo(name, lambda: self._multiplied(context))

    @torch.no_grad()
    def _multiplied(self, context: tuple[KVSend, ...]) -> Tensor:
        layers, kinds = len(context), len(self._rows) + len(self._dtypes)
        products = torch.zeros(1 + layers * kinds, 1 + layers * kinds, dtype=torch.float64)
        tokens = 0
        for number, part in enumerate(self._batches, 1):
            changes = self._changes(part, context, f"effects, batch {number}/{len(self._batches)}")
            products += (changes @ changes.T).double().cpu()
            tokens += part.reference.shape[0] * part.reference.shape[1]
        return products / tokens

    @torch.no_grad()
    def _prepare(self, ids: Tensor, seed: int) -> _Batch:
        oracle, n = self.problem.oracle, self.problem.prompt_tokens
        dtypes = tuple(dict.fromkeys(("native", *self._dtypes)))
        prompt_kv = PromptKV(oracle, oracle.prefill(ids[:, :n]), dtypes, self.problem.work)
        hidden, span = oracle.decode.embed(ids[:, n:-1], n)
        for layer in range(oracle.decode.kv_layers[0]):
            hidden = oracle.decode.block(layer, hidden, span)
        part = _Batch(prompt_kv, hidden, span, hidden, seed)
        part.reference = self._forward(part, (KVSend(),) * self.problem.layers)[-1]
        self._progress(f"prefilled {len(ids)} sequences")
        return part

    def _forward(self, part: _Batch, plan: Sequence[KVSend]) -> list[Tensor]:
        """The input of each KV layer, then the output of the last layer."""
        outputs = [part.hidden]
        for layer, send in enumerate(plan):
            outputs.append(self._through(layer, outputs[-1], part.span, self._kv(part, layer, send)))
        return outputs

    def _through(self, layer: int, hidden: Tensor, span: Span, kv: LayerKV) -> Tensor:
        """Through a KV layer, and those without attention that follow it."""
        decode = self.problem.oracle.decode
        first, stop = [*decode.kv_layers, len(decode.layers)][layer : layer + 2]
        hidden = decode.block(first, hidden, span, kv)
        for after in range(first + 1, stop):
            hidden = decode.block(after, hidden, span)
        return hidden

    def _kv(self, part: _Batch, layer: int, send: KVSend) -> LayerKV:
        ranges = self.problem.rule(layer, send).row_ranges(self.problem.prompt_tokens)
        return part.prompt_kv.read(send.wire_dtype, layer, ranges)

    def _changes(self, part: _Batch, context: tuple[KVSend, ...], name: str) -> Tensor:
        """float32 `[1 + layers * (rows + dtypes), coordinates]`: the context's error, then the effects."""
        probe = Probe(self.problem.oracle.decode, part.reference, self._sizes[1], part.seed)
        inputs = self._forward(part, context)
        error = probe.change(inputs[-1])
        kinds = len(self._rows) + len(self._dtypes)
        changes = torch.zeros(1 + len(context) * kinds, len(error), device=error.device)
        changes[0] = error
        depth, done = len(context), 0
        total = sum(len(self._options_about(context, layer)) * (depth - layer) for layer in range(depth))

        def ran(alternatives: int) -> None:
            nonlocal done
            done += alternatives
            self._progress(f"{name}: alternatives through a layer: {done}/{total}")

        for layers in self._together(context, part.hidden):
            for row, hidden in self._branches(part, context, inputs, layers, ran):
                changes[row] = probe.change(hidden) - error
        return changes

    def _together(self, context: tuple[KVSend, ...], hidden: Tensor) -> Iterator[range]:
        """Layers whose options go through the model side by side: as many as `state_bytes` allow."""
        states = max(1, self.problem.state_bytes // (hidden.numel() * hidden.element_size()))
        start = 0
        while start < len(context):
            stop, count = start + 1, len(self._options_about(context, start))
            while stop < len(context) and count + len(self._options_about(context, stop)) <= states:
                count += len(self._options_about(context, stop))
                stop += 1
            yield range(start, stop)
            start = stop

    def _branches(
        self,
        part: _Batch,
        context: tuple[KVSend, ...],
        inputs: Sequence[Tensor],
        layers: range,
        ran: Callable[[int], None],
    ) -> Iterator[tuple[int, Tensor]]:
        """The row in `changes` and the last layer's output of every option of `layers`, each in its layer alone.

        All go through a layer before any goes through the next: a streamed layer is read once, and so is its KV. They
        are alternatives of one text (`Blockwise.embed`), so some share a call: less than half the time of one by one.
        `ran` hears how many went through a layer.
        """
        kinds, decode = len(self._rows) + len(self._dtypes), self.problem.oracle.decode
        branches: dict[int, Tensor] = {}
        for layer in range(layers.start, len(context)):
            context_kv = self._kv(part, layer, context[layer])
            context_kv.move(decode.devices[decode.kv_layers[layer]])
            most = max(1, SIDE_BY_SIDE // part.hidden.shape[1])
            for rows in _groups(list(branches), most, kinds):
                hidden = torch.cat([branches[row] for row in rows], dim=1)
                hidden = self._through(layer, hidden, self._span_of(len(rows), part), context_kv.fork())
                branches |= zip(rows, hidden.chunk(len(rows), dim=1), strict=True)
            if layer in layers:
                for at, option in self._options_about(context, layer):
                    kv = self._kv(part, layer, option)
                    branches[1 + layer * kinds + at] = self._through(layer, inputs[layer], part.span, kv)
            ran(len(branches))
        yield from branches.items()

    def _span_of(self, branches: int, part: _Batch) -> Span:
        """Of so many alternatives side by side; the same for all batches, and computed once."""
        if branches not in self._spans:
            like = part.hidden.repeat(1, branches, 1)
            self._spans[branches] = self.problem.oracle.decode.span(like, part.span.start, branches)
        return self._spans[branches]

    def _options_about(self, context: Sequence[KVSend], layer: int) -> list[tuple[int, KVSend]]:
        """Other rows, then other dtypes, than a layer has in the context; each with its place among both."""
        send, rule = context[layer], self.problem.rule
        dtypes = enumerate(self._dtypes, len(self._rows))
        rows = enumerate(self._rows)
        options = [(at, row.model_copy(update={"wire_dtype": send.wire_dtype})) for at, row in rows]
        options += [(at, send.model_copy(update={"wire_dtype": dtype})) for at, dtype in dtypes]
        return [(at, option) for at, option in options if rule(layer, option) != rule(layer, send)]


@dataclass
class _Batch:
    prompt_kv: PromptKV
    hidden: Tensor
    span: Span
    reference: Tensor
    seed: int


def _groups(rows: list[int], size: int, kinds: int) -> list[list[int]]:
    """Rows of one layer's options in order, so many in each group, fewer in a layer's last.

    So whatever layers go side by side, the same rows share a call, and sums have the same order.
    """
    layers = [list(of_layer) for _, of_layer in groupby(rows, lambda row: (row - 1) // kinds)]
    return [layer[start : start + size] for layer in layers for start in range(0, len(layer), size)]


def _rows_of(send: KVSend) -> KVSend:
    """The rows of an option, whatever its wire dtype."""
    return send.model_copy(update={"wire_dtype": "native"})
