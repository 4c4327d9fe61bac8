"""Running pairs that all tests of a process share, by what they need.

To start a pair of genuine SGLang workers costs half a minute of CPU, most of it imports (each worker imports torch,
transformers and SGLang), and no test needs a pair of its own that leaves its pair as it found
it. So a test asks `shared_pair(prefill, decode, **options)` for a pair: the first that asks for these stages and
WorkerOptions starts it, later ones get the same cluster, in whatever module they stand. A fixture that returns one is
of a single test, never of a module: the pair may have ended since, and is then started again.

A test that breaks its pair, restarts a worker, or reads counters from zero starts one of its own: fixture `serving`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pdtrim_deploy.serving import Cluster

Start = Callable[..., contextlib.AbstractContextManager[Cluster]]


class SharedPairs:
    """Clusters by stages and options. `start(prefill, decode, **options)` is a context manager that yields one.

    At most `most` run at a time, because a pair takes 2 to 4 GB of memory; the one asked for longest ago ends first.
    """

    def __init__(self, start: Start, most: int = 1) -> None:
        self._start, self._most = start, most
        self._running: dict[tuple[Any, ...], tuple[Cluster, contextlib.ExitStack]] = {}  # asked for longest ago first

    def get(self, prefill: Path, decode: Path, **options: Any) -> Cluster:
        """The running cluster, started when there is none; ServingError when one of its programs has ended."""
        key = prefill, decode, *sorted(options.items())
        if key in self._running:
            entry = self._running.pop(key)
        else:
            while len(self._running) >= self._most:
                self._stop(next(iter(self._running)))
            stack = contextlib.ExitStack()
            entry = stack.enter_context(self._start(prefill, decode, **options)), stack
        self._running[key] = entry
        entry[0].check()
        return entry[0]

    @contextlib.contextmanager
    def unshared(self, prefill: Path, decode: Path, **options: Any) -> Iterator[Cluster]:
        """A cluster that nobody else gets; the shared ones end first, to leave it the memory."""
        self.close()
        with self._start(prefill, decode, **options) as cluster:
            yield cluster

    def close(self) -> None:
        """End the shared ones."""
        for key in list(self._running):
            self._stop(key)

    def _stop(self, key: tuple[Any, ...]) -> None:
        self._running.pop(key)[1].close()
