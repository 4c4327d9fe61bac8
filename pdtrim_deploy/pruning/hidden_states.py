"""Hidden states between the layers of many pruned models: what two of them share is computed once."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeAlias

from torch import Tensor

from pdtrim_deploy.pruning.objective import Objective
from pdtrim_deploy.pruning.solution import Op

_Key: TypeAlias = tuple[int, tuple[Op, ...]]


class HiddenStates:
    """Outputs of layer sequences from the embedding on, by batch; a new model costs what lies behind its first change.

    At most `memory` bytes are held (each state: sequences x tokens x hidden x 4 bytes in float32). Room is made by
    dropping the least recently used of other routes than the settled one; what then does not fit is not kept, so that
    early batches, on which most candidates lose, stay.
    """

    def __init__(self, objective: Objective, memory: int) -> None:
        self._objective, self._memory, self.held = objective, memory, 0
        self._states = OrderedDict[_Key, Tensor]()
        self._settled: tuple[Op, ...] = ()

    def settle(self, route: tuple[Op, ...]) -> None:
        """The routes to come are much like this one."""
        self._settled = route

    def behind(self, route: tuple[Op, ...], batch: int) -> Tensor:
        """`[sequences, tokens, hidden]`: what the last layer of `route` puts out."""
        known = next((n for n in range(len(route), 0, -1) if (batch, route[:n]) in self._states), 0)
        hidden = self._states[batch, route[:known]] if known else self._objective.start(batch)
        for n in range(1, known + 1):
            if (batch, route[:n]) in self._states:
                self._states.move_to_end((batch, route[:n]))
        for n in range(known, len(route)):
            hidden = self._objective.run(batch, route[n], hidden)
            self._keep((batch, route[: n + 1]), hidden)
        return hidden

    def _keep(self, key: _Key, hidden: Tensor) -> None:
        size = hidden.numel() * hidden.element_size()
        for old in [old for old in self._states if not self._is_settled(old)]:
            if self.held + size <= self._memory:
                break
            self._drop(old)
        if self.held + size <= self._memory:
            self._states[key] = hidden
            self.held += size

    def _drop(self, key: _Key) -> None:
        state = self._states.pop(key)
        self.held -= state.numel() * state.element_size()

    def _is_settled(self, key: _Key) -> bool:
        return key[1] == self._settled[: len(key[1])]
