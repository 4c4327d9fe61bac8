"""What goes from one of SGLang's decoder layers to the next, divided by rows and put together again.

Most layers keep the residual with the batch and give the next one a handle; others (models/granite.py) take and return
hidden states and residual. Written against SGLang 0.5.23 (layers/layer_boundary/residual, and
batch_overlap/two_batch_overlap.py, which divides such a batch in the same way).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sglang.srt.layers.layer_boundary.residual.stream import ResidualStream
from torch import Tensor


@dataclass(frozen=True)
class State:
    """Between two layers, `[tokens, hidden]`: `hidden` is to be added to `residual`, where there is one.

    Attributes:
        update: how it is added, where the residual is kept with the batch; None where layers take and return both, or
            nothing is to be added.
        with_batch: whether it is kept there.

    """

    ARGUMENTS: ClassVar[tuple[str, str]] = ("hidden_states", "residual")  # of a layer

    hidden: Tensor
    residual: Tensor | None
    update: Any = None
    with_batch: bool = False

    @classmethod
    def of(cls, call: Mapping[str, Any], batch: Any) -> State:
        """That which a layer is called with; what ranks still owe of it is summed. The batch keeps nothing."""
        hidden, stream = call["hidden_states"], batch.residual_stream
        if stream is None:
            return cls(hidden, call.get("residual"))
        whole, residual = stream.export(hidden)
        update = None if stream.pending is None else stream.pending.update
        batch.residual_stream = None
        return cls(whole, residual, update, with_batch=True)

    def arguments(self, batch: Any) -> dict[str, Any]:
        """Of a call of the next layer with `batch`, which gets the residual if that is kept there."""
        if not self.with_batch:
            return dict(zip(self.ARGUMENTS, (self.hidden, self.residual), strict=True))
        handle, batch.residual_stream = ResidualStream.from_handoff(self.hidden, self.residual, self.update)
        return {"hidden_states": handle}

    def rows(self, rows: Tensor) -> State:
        """Of these rows, int64."""
        residual = None if self.residual is None else self.residual[rows]
        return State(self.hidden[rows], residual, self.update, self.with_batch)

    @property
    def added(self) -> Tensor:
        """The hidden state itself."""
        return self.hidden if self.residual is None else self.hidden + self.residual


def joined(parts: tuple[State, State], rows: tuple[Tensor, Tensor]) -> State:
    """Of both parts' rows, in the order of the batch that they are of; a part without residual has zeros to add."""
    first, second = parts
    if (first.residual is None) != (second.residual is None):
        first, second = (_pending(part) for part in parts)
    hidden = together((first.hidden, second.hidden), rows)
    residual = None
    if first.residual is not None and second.residual is not None:
        residual = together((first.residual, second.residual), rows)
    return State(hidden, residual, first.update or second.update, first.with_batch)


def _pending(state: State) -> State:
    if state.residual is not None:
        return state
    return State(torch.zeros_like(state.hidden), state.hidden, state.update, state.with_batch)


def together(values: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor]) -> Tensor:
    """`[tokens, ...]` of the rows of two tensors, int64, which are all there are."""
    first, second = values
    whole = first.new_empty((len(first) + len(second), *first.shape[1:]))
    return whole.index_copy_(0, rows[0], first).index_copy_(0, rows[1], second)
