"""A prefill worker: one queue, first come first served, batches of at most `chunk` tokens, long prompts in chunks."""

from __future__ import annotations

from collections import deque

from pdtrim_deploy.sizing.rates import Rates


class PrefillWorker:
    """`start` begins the next batch, `finish` returns the requests whose prompts are then complete.

    Attributes:
        busy_s: total computing time of all started batches.

    """

    def __init__(self, rates: Rates) -> None:
        self.base, self.per_token = rates.prefill_base_ms / 1e3, 1 / rates.prefill_tokens_per_s
        self.chunk = rates.chunk_tokens
        self.queue: deque[list[int]] = deque()  # [request, prompt tokens still to do]
        self.done: list[int] | None = None  # None when idle
        self.busy_s = 0.0

    def put(self, request: int, tokens: int) -> None:
        """Append a request to the queue."""
        self.queue.append([request, tokens])

    def start(self) -> tuple[float, list[int]]:
        """Seconds of the next batch, and the requests whose first prompt token it has."""
        left, self.done, begun = self.chunk, [], []
        while self.queue and left:
            request = self.queue[0]
            part = min(left, request[1])
            begun.append(request[0])
            left -= part
            request[1] -= part
            if request[1]:
                break
            self.done.append(self.queue.popleft()[0])
        took = self.base + (self.chunk - left) * self.per_token
        self.busy_s += took
        return took, begun

    def finish(self) -> list[int]:
        """Requests whose last chunk was in the batch; the worker is idle afterwards."""
        done, self.done = self.done or [], None
        return done
