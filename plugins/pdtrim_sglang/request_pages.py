"""Where a request's rows lie while SGLang may still move them.

Between a forward pass and its chunk, prefill's radix cache exchanges a request's pages for those of another request
with the same tokens, if that one has put its into the cache before; the request's own are then free, and soon written
to by others. Rows of finished layers leave earlier, and may wait for their turn: they are read from the pages that hold
them when they are packed, and as long as one is being packed SGLang waits with the exchange.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class MovingPages:
    """Pages, int32, of tokens `[start, stop)`: to be read under `lock`, once the device event `known` has come."""

    start: int
    stop: int
    pages: Any
    lock: threading.Lock
    known: Any = None


@dataclass(eq=False)
class RequestPages:
    """Those of one request, a part for each of its forward passes."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    parts: list[MovingPages] = field(default_factory=list)

    def add(self, start: int, stop: int, pages: Any) -> MovingPages:
        """A forward pass computes the last of tokens `[start, stop)`."""
        self.parts.append(part := MovingPages(start, stop, pages, self.lock))
        return part

    @contextmanager
    def moving(self, pages: Callable[[int, int], Any], event: Callable[[], Any]) -> Iterator[None]:
        """Inside, SGLang may exchange pages; then `pages(start, stop)` are those of tokens, once `event()` has come."""
        with self.lock:
            yield
            for part in self.parts:
                part.pages = pages(part.start, part.stop)
            known = event()
            for part in self.parts:
                part.known = known
