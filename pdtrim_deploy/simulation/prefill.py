"""A prefill worker: one queue, first come first served, batches of at most `chunk` tokens, long prompts in chunks."""

from __future__ import annotations

from collections import deque

from pdtrim_deploy.sizing.rates import Rates


class PrefillWorker:
    """`start` makes the next batch, `finish` says whose prompts are then whole.

    Attributes:
        busy_s: time spent computing, of all batches started.

    """

    def __init__(self, rates: Rates) -> None:
        self.base, self.per_token = rates.prefill_base_ms / 1e3, 1 / rates.prefill_tokens_per_s
        self.chunk = rates.chunk_tokens
        self.queue: deque[list[int]] = deque()  # [request, prompt tokens still to do]
        self.done: list[int] | None = None  # None when idle
        self.busy_s = 0.0

    def put(self, request: int, tokens: int) -> None:
        """At the queue's end."""
        self.queue.append([request, tokens])

    def start(self) -> tuple[float, list[int]]:
        """Seconds that the next batch takes, and the requests that it begins with their first token."""
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
        """Requests whose last chunk the batch had; the worker is idle."""
        done, self.done = self.done or [], None
        return done
