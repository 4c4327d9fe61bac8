"""Vector clocks of threads and streams: two accesses to a place that nothing orders are a race, whenever they happened.

A test tells a `Clocks` what its pretended device does (an operation, an event, a wait) and what threads tell each other
(a queue, a message). Time says nothing: an access counts as later only if a chain of these leads to it from the other
(Lamport 1978; FastTrack, PLDI 2009). So a wait that is missing is found in every run, also where luck has put the right
bytes there in time.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Hashable, Iterable
from typing import Any

Clock = dict[str, int]


class Clocks:
    """An actor is a thread (by its name) or its stream. `races` are sentences."""

    def __init__(self) -> None:
        self.races: list[str] = []
        self._lock = threading.RLock()
        self._clocks: dict[str, Clock] = {}
        self._written: dict[Hashable, tuple[str, int]] = {}
        self._read: dict[Hashable, Clock] = {}

    def now(self, actor: str) -> Clock:
        """What the actor knows to have happened."""
        with self._lock:
            return dict(self._clocks.setdefault(actor, {}))

    def learn(self, actor: str, known: Clock) -> None:
        """The actor has waited for what has this clock."""
        with self._lock:
            clock = self._clocks.setdefault(actor, {})
            for other, time in known.items():
                clock[other] = max(clock.get(other, 0), time)

    def access(self, actor: str, reads: Iterable[Hashable] = (), writes: Iterable[Hashable] = ()) -> None:
        """The actor reads and writes places; each access is a tick of its clock."""
        with self._lock:
            clock = self._clocks.setdefault(actor, {})
            clock[actor] = time = clock.get(actor, 0) + 1
            for place in reads:
                self._after("reads", actor, place, self._written.get(place))
                self._read.setdefault(place, {})[actor] = time
            for place in writes:
                for other in (self._written.get(place), *self._read.pop(place, {}).items()):
                    self._after("writes", actor, place, other)
                self._written[place] = actor, time

    def _after(self, does: str, actor: str, place: Hashable, other: tuple[str, int] | None) -> None:
        if other is not None and other[0] != actor and self._clocks[actor].get(other[0], 0) < other[1]:
            self.races.append(f"{actor} {does} {place}, and nothing has it wait for {other[0]}")


def clocked(clocks: Clocks, form: type) -> Any:
    """A class in the place of one without arguments, or with one, whose objects have `clocks`."""
    members = {"__init__": lambda self, *sizes: form.__init__(self, clocks, *sizes)}
    return type(form.__name__, (form,), members | {"__class_getitem__": classmethod(lambda cls, _: cls)})


class ClockedQueue:
    """A queue.SimpleQueue that also tells who takes an item what its giver knew."""

    def __init__(self, clocks: Clocks) -> None:
        self._clocks, self._items = clocks, queue.SimpleQueue[tuple[Clock, Any]]()

    def put(self, item: Any) -> None:
        self._items.put((self._clocks.now(thread()), item))

    def get(self, timeout: float | None = None) -> Any:
        known, item = self._items.get(timeout=timeout)
        self._clocks.learn(thread(), known)
        return item


class ClockedSemaphore:
    """A threading.Semaphore that also tells who acquires it what its permit's releaser knew; of 1, a lock.

    Permits are taken in the order of their release; nobody has released the first `count`.
    """

    def __init__(self, clocks: Clocks, count: int = 1) -> None:
        self._clocks, self._semaphore = clocks, threading.Semaphore(count)
        self._permits = deque[Clock]({} for _ in range(count))

    def acquire(self, timeout: float | None = None) -> bool:
        acquired = self._semaphore.acquire(timeout=timeout)
        if acquired:
            self._clocks.learn(thread(), self._permits.popleft())
        return acquired

    def release(self) -> None:
        self._permits.append(self._clocks.now(thread()))
        self._semaphore.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def thread() -> str:
    """The actor that runs this."""
    return threading.current_thread().name


def stream() -> str:
    """Its stream on the device."""
    return f"stream of {thread()}"
