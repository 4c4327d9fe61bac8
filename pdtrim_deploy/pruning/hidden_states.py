"""Hidden states between the layers of many pruned models: what two of them share is computed once."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.mapped import mapped
from pdtrim_deploy.pruning.objective import Objective
from pdtrim_deploy.pruning.solution import Op

Route: TypeAlias = tuple[Op, ...]
_Key: TypeAlias = tuple[int, Route]


class HiddenStates:
    """Outputs of layer sequences from the embedding on, by batch; a new model costs what lies behind its first change.

    At most `memory` bytes are held (each state: sequences x tokens x hidden x 4 bytes in float32). The least recently
    used of other routes than the settled one make room; where they do not make enough, the new one is not kept, so
    that early batches, on which most candidates lose, stay. What has no place in memory goes by the same rule to mapped
    files of at most `disk` bytes in `folder`.
    """

    def __init__(self, objective: Objective, memory: int, disk: int = 0, folder: Path | None = None) -> None:
        self._objective = objective
        self._shelves = [_Shelf(memory), _Files(disk, folder)]
        self._settled: Route = ()

    @property
    def held(self) -> int:
        """Bytes in memory."""
        return self._shelves[0].held

    @property
    def on_disk(self) -> int:
        """Bytes in files."""
        return self._shelves[1].held

    def settle(self, route: Route) -> None:
        """The routes to come are much like this one."""
        self._settled = route

    def final_states(
        self, routes: Sequence[Route], batch: int, progress: Callable[[str], None] = lambda _: None
    ) -> list[Tensor]:
        """What the last layer of each route puts out: `[sequences, tokens, hidden]`.

        All go on together, block by block: of a model whose weights come from disk each block comes once. `progress`
        hears of each block that was run.
        """
        states, done = [], []
        for route in routes:
            known = next((n for n in range(len(route), 0, -1) if self._find((batch, route[:n])) is not None), 0)
            state = self._find((batch, route[:known])) if known else None
            states.append(self._objective.start(batch) if state is None else state)
            done.append(known)
            for n in range(1, known + 1):
                self._touch((batch, route[:n]))
        for block in range(self._objective.blocks):
            outputs = dict[Route, Tensor]()
            for at, route in enumerate(routes):
                if done[at] == len(route) or route[done[at]][0] != block:
                    continue
                done[at] += 1
                prefix = route[: done[at]]
                if prefix not in outputs:
                    outputs[prefix] = self._objective.run(batch, prefix[-1], states[at])
                    self._keep((batch, prefix), outputs[prefix])
                states[at] = outputs[prefix]
            if outputs:
                progress(f"{len(routes)} candidates, block {block + 1}/{self._objective.blocks}")
        return states

    def _find(self, key: _Key) -> Tensor | None:
        return next((shelf.states[key] for shelf in self._shelves if key in shelf.states), None)

    def _touch(self, key: _Key) -> None:
        for shelf in self._shelves:
            if key in shelf.states:
                shelf.states.move_to_end(key)

    def _keep(self, key: _Key, hidden: Tensor) -> None:
        evicted = [(key, hidden)]
        for shelf in self._shelves:
            evicted = [gone for state in evicted for gone in shelf.keep(*state, self._stays)]

    def _stays(self, key: _Key) -> bool:
        """Whether it is of the settled route."""
        return key[1] == self._settled[: len(key[1])]


class _Shelf:
    """States in memory, the least recently used first."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held, self.states = limit, 0, OrderedDict[_Key, Tensor]()

    def keep(self, key: _Key, hidden: Tensor, stays: Callable[[_Key], bool]) -> list[tuple[_Key, Tensor]]:
        """What is evicted: older states outside the settled route, or, where these make too little room, this one."""
        size, gone = hidden.numel() * hidden.element_size(), list[tuple[_Key, Tensor]]()
        while self.held + size > self.limit:
            old = self._oldest(stays)
            if old is None:
                return [*gone, (key, hidden)]
            gone.append((old, self.states.pop(old)))
            self.held -= gone[-1][1].numel() * gone[-1][1].element_size()
        self.states[key] = self.store(hidden)
        self.held += size
        return gone

    def _oldest(self, stays: Callable[[_Key], bool]) -> _Key | None:
        """The least recently used that does not stay. Those that do go to the end, out of the next one's way."""
        for _ in range(len(self.states)):
            key = next(iter(self.states))
            if not stays(key):
                return key
            self.states.move_to_end(key)
        return None

    def store(self, hidden: Tensor) -> Tensor:
        return hidden


class _Files(_Shelf):
    """States in mapped files (`mapped`)."""

    def __init__(self, limit: int, folder: Path | None) -> None:
        super().__init__(limit)
        self._folder = folder

    def store(self, hidden: Tensor) -> Tensor:
        try:
            return mapped(hidden, self._folder)
        except OSError as error:
            raise UserError(
                f"no room for hidden states in {self._folder or tempfile.gettempdir()} ({error.strerror}); free some "
                "space or lower pruning.disk_mb, and run the same command again: the search goes on where it was"
            ) from error
