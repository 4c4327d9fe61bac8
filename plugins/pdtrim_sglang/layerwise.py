"""Rows of finished layers leave while prefill's forward pass computes the layers after them.

SGLang hands over a chunk of a prompt when its forward pass has ended. Until then, parts of it are queued: rows of some
layers, up to the token that the pass computes last. `LayerPositions` say how far each layer is, so that the chunk, when
it comes, sends what is missing, and only that; the last layer's rows, and a request's aux row, always go with it. A
part that was not queued by then is dropped. So wherever no part can leave (decode has no room yet, a graph runs through
without calling Python), all rows leave with the chunk.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from pdtrim_deploy.kvcache.layout import ChunkLayout, chunk_layout
from pdtrim_deploy.plan import PDPlan
from pdtrim_sglang import vital
from pdtrim_sglang.by_request import ByRequest
from pdtrim_sglang.forward_pass import ForwardPass
from pdtrim_sglang.layer_positions import LayerPositions
from pdtrim_sglang.packing import Chunk
from pdtrim_sglang.pool import PoolView
from pdtrim_sglang.request_pages import RequestPages


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows of `chunk.layers` up to `chunk.stop`, which are in the pool once prefill's KV layer `after` is computed.

    The chunk begins with the first token that any layer lacks; where each layer does is known when it is queued.
    """

    after: int
    chunk: Chunk
    request: _Request


@dataclass
class _Request:
    """`positions` are there when decode waits for its rows; its full layers have those of `reused_tokens` tokens."""

    room: int
    prompt_tokens: int
    positions: LayerPositions | None = None
    reused_tokens: int = 0
    pages: RequestPages = field(default_factory=RequestPages)


class LayerwiseSends:
    """Parts of the requests of a prefill worker, of `least_bytes` each and of `most_tokens` tokens at most.

    The scheduler's thread calls all that is public here. On a GPU a thread of our own waits until the device has
    computed a part's layers; `queue_chunks` takes chunks of one room, in order, and waits for nothing.
    """

    def __init__(
        self,
        plan: PDPlan,
        pool: PoolView,
        least_bytes: int,
        most_tokens: int,
        queue_chunks: Callable[[Sequence[Chunk]], None],
    ) -> None:
        self._plan, self._pool, self._queue_chunks = plan, pool, queue_chunks
        self.least_bytes, self._most_tokens = least_bytes, most_tokens
        self._computed_after = list(accumulate(plan.layer_map, max))  # decode's layers up to each
        self._requests = ByRequest[_Request]()
        self._lock = threading.Lock()  # over positions and the order of chunks
        self._pass, self._due = ForwardPass(), deque[_Part]()
        self._on_device: queue.SimpleQueue[tuple[Any, list[_Part]]] = queue.SimpleQueue()
        if not pool.keys[0].is_cpu:
            vital.start("sender of layers", self._wait)

    def expect(self, rid: str, room: int, prompt_tokens: int) -> None:
        """SGLang's request `rid` will be computed here and sent to `room`."""
        with self._lock:
            self._requests.put(rid, room, _Request(room, prompt_tokens))

    def ready(self, room: int, reused_tokens: int) -> None:
        """Decode waits for the room's rows, and has those of its first tokens in full layers."""
        with self._lock:
            if (request := self._requests.of_room(room)) is not None:
                request.positions = LayerPositions(len(self._plan.kv), self._plan.first_sent(reused_tokens))
                request.reused_tokens = reused_tokens

    def forget(self, room: int) -> None:
        """Nothing more will be sent to `room`."""
        with self._lock:
            self._requests.forget(room)

    def begin(
        self, rids: Sequence[str], starts: Sequence[int], lengths: Sequence[int], pages: Callable[[int, int, int], Any]
    ) -> None:
        """A forward pass begins over tokens `[start, start + length)` of each request.

        `pages(place, start, stop)` are the pages, int32, of tokens `[start, stop)` of the request at that place.
        """
        self._pass, parts = ForwardPass(), list[_Part]()
        with self._lock:
            for place, (rid, start, length) in enumerate(zip(rids, starts, lengths, strict=True)):
                request = self._requests.get(rid)
                if request is not None and request.positions is not None:
                    parts += self._parts(request, request.positions.first, start + length, place, pages)
        self._due = deque(sorted(parts, key=lambda part: part.after))

    def moving(self, rid: str, pages: Callable[[int, int], Any]) -> AbstractContextManager[None]:
        """Inside, SGLang may exchange pages of request `rid`; then `pages(start, stop)` are those of its tokens."""
        request = self._requests.get(rid)
        return nullcontext() if request is None else request.pages.moving(pages, self._pool)

    def computed(self, layer: int) -> None:
        """K and V of prefill's KV layers up to `layer` are in the pool, on a GPU once its stream has come here."""
        parts = []
        while self._due and self._due[0].after <= layer:
            parts.append(self._due.popleft())
        if not parts:
            return
        if (event := self._pool.record_event()) is None:
            self._send(parts)
        else:
            self._on_device.put((event, parts))

    def end(self) -> None:
        """The forward pass returned: what was not due leaves with its chunk."""
        self._due.clear()
        self._pass.returned(self._pool.record_event())

    def submit(self, chunk: Chunk) -> None:
        """Queue what is missing of a chunk whose forward pass has ended."""
        with self._lock:
            request = self._requests.of_room(chunk.room)
            positions = None if request is None else request.positions
            self._queue_chunks([chunk] if positions is None else _rest(chunk, positions))

    def _parts(
        self, request: _Request, start: int, stop: int, place: int, pages: Callable[[int, int, int], Any]
    ) -> list[_Part]:
        """What may leave of tokens `[start, stop)` while they are computed: of whole pages, as SGLang's chunks."""
        stop -= 0 if stop == request.prompt_tokens else stop % self._pool.page_size
        if not start < stop <= request.prompt_tokens:
            return []
        rows = self._pool.kv_heads, None, request.reused_tokens
        layout = chunk_layout(self._plan, request.prompt_tokens, start, stop, *rows)
        ranges = early_layers(layout, len(self._plan.kv), self.least_bytes)
        if not ranges:
            return []
        chunk = Chunk(
            request.room, None, start, request.prompt_tokens, start, stop, False, 0, forward_pass=self._pass,
            reused_tokens=request.reused_tokens, moving=request.pages.add(start, stop, pages(place, start, stop)),
        )  # fmt: skip
        return [_Part(self._computed_after[layers[-1]], replace(chunk, layers=layers), request) for layers in ranges]

    def _wait(self) -> None:
        while True:
            event, parts = self._on_device.get()  # a stream comes to its events in this order
            event.synchronize()
            self._send(parts)
            del event, parts

    def _send(self, parts: Sequence[_Part]) -> None:
        for part in parts:
            with self._lock:
                request = self._requests.of_room(part.chunk.room)
                if request is not part.request or request.positions is None:  # a room number may be used again
                    continue
                chunks, positions = list[Chunk](), request.positions
                layers, stop = part.chunk.layers or range(0), part.chunk.stop
                for run, at in positions.runs(layers):
                    for start in range(at, stop, self._most_tokens):
                        end = min(start + self._most_tokens, stop)
                        chunks.append(replace(part.chunk, layers=run, start=start, stop=end))
                positions.advance(layers, stop)
                if chunks:
                    self._queue_chunks(chunks)


def early_layers(layout: ChunkLayout, layers: int, least_bytes: int) -> list[range]:
    """Ranges of a chunk's `layers` that may leave before it: of `least_bytes` each, from the first layer on.

    The last layer is in none of them, nor is what is left when they are full.
    """
    sizes = {rows.decode_layer: rows.bytes for rows in layout.layers}
    ranges, first, size = list[range](), 0, 0
    for layer in range(layers - 1):
        size += sizes.get(layer, 0)
        if size >= least_bytes:
            ranges.append(range(first, layer + 1))
            first, size = layer + 1, 0
    return ranges


def _rest(chunk: Chunk, positions: LayerPositions) -> list[Chunk]:
    """What is missing of a chunk; the last layer's part is the last, even an empty one: it completes the chunk."""
    every = range(len(positions))
    runs = [(layers, at) for layers, at in positions.runs(every) if at < chunk.stop or layers.stop == every.stop]
    positions.advance(every, chunk.stop)
    return [
        replace(
            chunk,
            start=min(max(at, chunk.start), chunk.stop),
            layers=None if layers == every else layers,
            last=chunk.last and layers.stop == every.stop,
        )
        for layers, at in runs
    ]
