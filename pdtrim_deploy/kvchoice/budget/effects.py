"""The effect of each way of sending each layer's KV on decode's predictions, and how effects add up.

With effects as vectors (`Probe.change`), KL(dense || plan) is half the squared length of their sum. So one pass over
layers and ways measures both the harm of each way and, in the Gram matrix, how any two strengthen or cancel each other.
Effects are measured around a context, the plan of all other layers, because what one layer cannot read, another may
still provide; the search measures them again around the solver's plan.

To save time, the effect of a way is the effect of its rows (in the context's dtype) plus that of its dtype (on the
context's rows): rows and dtypes are measured separately, not every pair of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from pdtrim_deploy.kvchoice.base import Problem, Progress
from pdtrim_deploy.kvchoice.budget.decode_batch import DecodeBatch
from pdtrim_deploy.kvchoice.budget.option_parts import OptionParts
from pdtrim_deploy.kvchoice.budget.probe import Probe
from pdtrim_deploy.kvchoice.budget.products import effect_products, remembered, summed_kl
from pdtrim_deploy.models.layer_kv import Span
from pdtrim_deploy.plan import KVSend
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
        self._parts, self._sizes = OptionParts.of(self.options), [batch, draws]
        self._known: dict[tuple[KVSend, ...], Effects] = {}
        self._spans: dict[int, Span] = {}
        parts = enumerate(problem.sequences.split(batch), problem.seed)
        self._batches = [self._prepare(ids, seed) for seed, ids in parts]

    @torch.no_grad()
    def divergence(self, plan: tuple[KVSend, ...]) -> float:
        """KL(dense || plan), nats a token, exact."""
        total = 0.0
        for number, batch in enumerate(self._batches, 1):
            self._progress(f"KL of a plan: batch {number}/{len(self._batches)}")
            for expected, row in zip(batch.reference, batch.forward(plan)[-1], strict=True):
                total += summed_kl(self.problem.oracle.decode, expected, row)
        return total / sum(batch.tokens for batch in self._batches)

    def about(self, context: tuple[KVSend, ...]) -> Effects:
        """Effects of every option of every layer, with the other layers as in `context`; measured once per context."""
        if context not in self._known:
            self._known[context] = self._measured(context)
        return self._known[context]

    def _measured(self, context: tuple[KVSend, ...]) -> Effects:
        layers, products = len(context), self._products(context)
        # option = its rows + its dtype; the context's own rows and dtype are no change
        parts = torch.zeros(len(self.options), len(self._parts), dtype=torch.float64)
        for at, option in enumerate(self.options):
            parts[at, list(self._parts.places(option))] = 1
        effects = torch.block_diag(*[parts] * layers)
        gram = (effects @ products[1:, 1:] @ effects.T).view(layers, len(self.options), layers, len(self.options))
        linear = (effects @ products[1:, 0]).view(layers, len(self.options))
        return Effects(context, self.options, float(products[0, 0]), linear, gram)

    def _products(self, context: tuple[KVSend, ...]) -> Tensor:
        """Gram matrix, float64, of the context's error and each layer's rows and dtypes; stored in `memo`."""
        rows = [[send.mode, send.n_first, send.n_last, *[send.share] * bool(send.share)] for send in self._parts.rows]
        key = [rows, self._parts.dtypes, [send.model_dump() for send in context], self._sizes]
        return remembered(self.problem, key, lambda: self._multiplied(context))

    @torch.no_grad()
    def _multiplied(self, context: tuple[KVSend, ...]) -> Tensor:
        count = len(self._batches)
        return effect_products(
            (self._changes(batch, context, f"effects, batch {number}/{count}"), batch.tokens)
            for number, batch in enumerate(self._batches, 1)
        )

    @torch.no_grad()
    def _prepare(self, ids: Tensor, seed: int) -> DecodeBatch:
        batch = DecodeBatch(self.problem, ids, seed, self._parts.dtypes, self._spans)
        self._progress(f"prefilled {len(ids)} sequences")
        return batch

    def _changes(self, batch: DecodeBatch, context: tuple[KVSend, ...], name: str) -> Tensor:
        """float32 `[1 + layers * (rows + dtypes), coordinates]`: the context's error, then the effects."""
        probe = Probe(self.problem.oracle.decode, batch.reference, self._sizes[1], batch.seed)
        inputs = batch.forward(context)
        error = probe.change(inputs[-1])
        changes = torch.zeros(1 + len(context) * len(self._parts), len(error), device=error.device)
        changes[0] = error
        depth, done = len(context), 0
        total = sum(len(self._others(context, layer)) * (depth - layer) for layer in range(depth))

        def ran(alternatives: int) -> None:
            nonlocal done
            done += alternatives
            self._progress(f"{name}: alternatives through a layer: {done}/{total}")

        for layers in self._together(context, batch.hidden):
            for row, hidden in self._branches(batch, context, inputs, layers, ran):
                changes[row] = probe.change(hidden) - error
        return changes

    def _together(self, context: tuple[KVSend, ...], hidden: Tensor) -> Iterator[range]:
        """Layers whose options go through the model side by side: as many as `state_bytes` allow."""
        states = max(1, self.problem.state_bytes // (hidden.numel() * hidden.element_size()))
        start = 0
        while start < len(context):
            stop, count = start + 1, len(self._others(context, start))
            while stop < len(context) and count + len(self._others(context, stop)) <= states:
                count += len(self._others(context, stop))
                stop += 1
            yield range(start, stop)
            start = stop

    def _branches(
        self,
        batch: DecodeBatch,
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
        kinds, decode = len(self._parts), self.problem.oracle.decode
        branches: dict[int, Tensor] = {}
        for layer in range(layers.start, len(context)):
            context_kv = batch.kv(layer, context[layer])
            context_kv.move(decode.devices[decode.kv_layers[layer]])
            most = max(1, SIDE_BY_SIDE // batch.hidden.shape[1])
            for rows in _groups(list(branches), most, kinds):
                hidden = torch.cat([branches[row] for row in rows], dim=1)
                hidden = batch.through(layer, hidden, context_kv.fork(), len(rows))
                branches |= zip(rows, hidden.chunk(len(rows), dim=1), strict=True)
            if layer in layers:
                for at, option in self._others(context, layer):
                    kv = batch.kv(layer, option)
                    branches[1 + layer * kinds + at] = batch.through(layer, inputs[layer], kv)
            ran(len(branches))
        yield from branches.items()

    def _others(self, context: Sequence[KVSend], layer: int) -> list[tuple[int, KVSend]]:
        """What a layer may be sent besides what it is in the context."""
        return self._parts.others(self.problem, layer, context[layer])


def _groups(rows: list[int], size: int, kinds: int) -> list[list[int]]:
    """Rows of one layer's options in order, so many in each group, fewer in a layer's last.

    So whatever layers go side by side, the same rows share a call, and sums have the same order.
    """
    layers = [list(of_layer) for _, of_layer in groupby(rows, lambda row: (row - 1) // kinds)]
    return [layer[start : start + size] for layer in layers for start in range(0, len(layer), size)]
