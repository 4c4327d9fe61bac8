"""TensorRT execution contexts: a shape that a CUDA graph has captured keeps a context of its own for life.

A captured graph is tied to the state of its context ("one execution context per captured graph", TensorRT developer
guide), so a context that changed its shape afterwards would make the graph's replay wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pdtrim_sglang.executors.session import Session


class Context:
    """A session, and what it was last given, so that nothing is set twice."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._sizes: dict[str, int] = {}
        self._pointers: dict[str, int] = {}

    def size(self, name: str, count: int) -> None:
        """Input `name` has `count` elements from now on."""
        if self._sizes.get(name) != count:
            self._session.set_shape(name, (count,))
            self._sizes[name] = count

    def bind(self, name: str, pointer: int) -> None:
        """Input or output `name` lies at device address `pointer` from now on."""
        if self._pointers.get(name) != pointer:
            self._session.set_address(name, pointer)
            self._pointers[name] = pointer

    def enqueue(self, stream: int) -> bool:
        return self._session.enqueue(stream)


class Contexts:
    """One context for every shape that was captured, and one for all others. Contexts share their scratch memory.

    SGLang runs a shape twice before it captures it (decode_cuda_graph_runner.py, 0.5.23), as TensorRT asks: the first
    enqueue of a shape may allocate. `capturing` says whether the current stream is being captured.
    """

    def __init__(self, session: Session, capturing: Callable[[], bool]) -> None:
        self._session, self._capturing = session, capturing
        self._captured: dict[tuple[int, ...], Context] = {}
        self._eager: Context | None = Context(session)

    def of(self, sizes: Mapping[str, int]) -> Context:
        """The context for a run whose inputs have these sizes, with the sizes set."""
        shape = tuple(sizes.values())
        context = self._captured.get(shape)
        if context is None:
            context = self._eager or Context(self._session.another())
            self._eager = context
            for name, count in sizes.items():
                context.size(name, count)
            if self._capturing():
                self._captured[shape], self._eager = context, None
        return context
