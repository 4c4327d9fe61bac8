"""Text on its way through a stage model, layer by layer: the forward pass that oracle, search and healing share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy

from torch import Tensor, nn

from pdtrim_deploy.models.blockwise import Blockwise
from pdtrim_deploy.models.layer_kv import LayerKV


class LayerRun:
    """Several batches, all of which go through a layer before any goes through the next: streamed ones are read once.

    Gradients flow where the caller lets them.

    Args:
        parts: int64 `[batch, tokens]` each, all of whose tokens stand at `start` and behind; `branches` as in
            `Blockwise.embed`.

    Attributes:
        states: what the next layer reads of each batch, `[batch, tokens, hidden]`.
        layer: the next layer.

    """

    def __init__(self, runner: Blockwise, parts: Iterable[Tensor], start: int = 0, branches: int = 1) -> None:
        embedded = [runner.embed(part, start, branches) for part in parts]
        self.runner, self.layer = runner, 0
        self.states, self.spans = [hidden for hidden, _ in embedded], [span for _, span in embedded]

    @property
    def running(self) -> bool:
        """Whether there are layers left."""
        return self.layer < len(self.runner.layers)

    def fork(self) -> LayerRun:
        """The same, to go on by itself."""
        run = copy(self)
        run.states = list(self.states)
        return run

    def advance(
        self,
        kvs: Sequence[LayerKV | None] | None = None,
        *,
        adds: bool = True,
        layer: int | None = None,
        student: nn.Module | None = None,
    ) -> None:
        """Through the next layer.

        Args:
            kvs: what each batch's queries see besides each other; these grow by the layer's own K and V.
            adds: False for a layer that runs for its K and V alone: states stay as they are.
            layer, student: another layer than the next, and what runs in its place.

        """
        layer = self.layer if layer is None else layer
        for at, (hidden, span) in enumerate(zip(self.states, self.spans, strict=True)):
            out = self.runner.block(layer, hidden, span, kvs[at] if kvs else None, student)
            if adds:
                self.states[at] = out
        self.layer = layer + 1

    def skip(self) -> None:
        """Past the next layer, which changes no state and whose K and V nobody reads."""
        self.layer += 1

    def finish(self, kvs: Sequence[Sequence[LayerKV]] | None = None) -> list[Tensor]:
        """Through all layers that are left; what comes out of the last. `kvs`: by layer, then by batch."""
        while self.running:
            self.advance(kvs[self.layer] if kvs is not None else None)
        return self.states
