"""Where a request's rows lie while SGLang may still move them.

Between a forward pass and its chunk, prefill's radix cache exchanges a request's pages for those of another request
with the same tokens, if that one has put its into the cache before; the request's own are then free, and soon written
to by others. Rows of finished layers leave earlier, and may wait for their turn: they are read from the pages that hold
them when they are packed. SGLang waits with the exchange while one is being packed; on a GPU only until the packing is
queued, and what its stream does after the exchange waits there for the packing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

from pdtrim_sglang.by_request import ByRequest
from pdtrim_sglang.pool import PoolView


@dataclass(eq=False)
class MovingPages:
    """Pages, int32, of tokens `[start, stop)`: to be read inside `request.reading`, after the device event `known`."""

    start: int
    stop: int
    pages: Any
    request: RequestPages
    known: Any = None


@dataclass(eq=False)
class RequestPages:
    """Those of one request, a part for each of its forward passes, as long as a chunk refers to it.

    Threads that pack drop the last reference to a part at any time. So `parts` are references without callbacks: the
    list changes under the lock alone.

    Attributes:
        readers: device events, each behind a packing that reads the pages as they were before the next exchange.

    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    parts: list[ref[MovingPages]] = field(default_factory=list)
    readers: list[Any] = field(default_factory=list)

    def add(self, start: int, stop: int, pages: Any) -> MovingPages:
        """A forward pass computes the last of tokens `[start, stop)`."""
        part = MovingPages(start, stop, pages, self)
        with self.lock:
            self.parts = [ref(part), *map(ref, self._held())]
        return part

    @contextmanager
    def reading(self) -> Iterator[list[Any]]:
        """Inside, pages are not exchanged. Who reads on beyond it, on a device, appends the event of its end."""
        with self.lock:
            yield self.readers

    @contextmanager
    def moving(self, pages: Callable[[int, int], Any], pool: PoolView) -> Iterator[None]:
        """Inside, SGLang may exchange pages of `pool` on this thread's stream; then `pages(start, stop)` are those."""
        with self.lock:
            pool.after(*self.readers)
            self.readers.clear()
            yield
            parts = self._held()
            for part in parts:
                part.pages = pages(part.start, part.stop)
            known = pool.record_event()
            for part in parts:
                part.known = known

    def _held(self) -> list[MovingPages]:
        """The parts that a chunk refers to."""
        return [part for part in (each() for each in self.parts) if part is not None]


class WaitingPages:
    """Those of a worker's chunks that wait to be read, by SGLang's request; called by its scheduler's thread."""

    def __init__(self) -> None:
        self._requests = ByRequest[RequestPages]()

    def expect(self, rid: str, room: int) -> None:
        """Chunks of request `rid` will be sent to `room`."""
        self._requests.put(rid, room, RequestPages())

    def forget(self, room: int) -> None:
        """No more will be sent there."""
        self._requests.forget(room)

    def add(self, room: int, start: int, stop: int, pages: Any) -> MovingPages | None:
        """A chunk has `pages`; None where nothing is expected to be sent there."""
        request = self._requests.of_room(room)
        return None if request is None else request.add(start, stop, pages)

    def moving(self, rid: str, pages: Callable[[int, int], Any], pool: PoolView) -> AbstractContextManager[None]:
        """As `RequestPages.moving`, of request `rid`."""
        request = self._requests.get(rid)
        return nullcontext() if request is None else request.moving(pages, pool)
