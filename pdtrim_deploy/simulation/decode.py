"""A decode worker with continuous batching: requests join and leave between steps; batch size gives a step's time.

Between two changes of the batch all steps take the same time, so a run of them is one event.
"""

from __future__ import annotations

import math
from collections import deque
from heapq import heappop, heappush


class DecodeWorker:
    """Times are seconds on the simulation's clock.

    Attributes:
        next_at: when the batch changes next; infinite when idle.
        runs: (step time, tokens emitted at that distance from the one before), for percentiles of ITL.

    """

    def __init__(self, steps_s: list[float], pool_tokens: float) -> None:
        self.steps, self.free = steps_s, pool_tokens
        self.room = len(steps_s) - 1
        self.waiting: deque[int] = deque()  # waiting for rows of the pool, before prefill
        self.landed: deque[int] = deque()  # KV has arrived, not in the batch yet
        self.active: list[tuple[int, int]] = []  # heap of (step at which it ends, request)
        self.step, self.since, self.step_s = 0, 0.0, 0.0
        self.next_at = math.inf
        self.busy_s = 0.0
        self.runs: list[tuple[float, int]] = []

    def land(self, request: int, now: float) -> None:
        """A request's KV has arrived: it joins after the running step, or at once when idle."""
        self.landed.append(request)
        if not self.active:
            self.next_at = now
        elif len(self.active) < self.room:
            boundary = self.since + max(1, math.ceil((now - self.since) / self.step_s)) * self.step_s
            self.next_at = min(self.next_at, boundary)

    def change(self, now: float, answer: list[int]) -> tuple[list[int], list[int]]:
        """At `next_at`: return requests that join (their first token is out) and that are done; set the next change."""
        if self.active:
            steps = round((now - self.since) / self.step_s)
            self.step += steps
            self.busy_s += now - self.since
            self.runs.append((self.step_s, steps * len(self.active)))
        ended, joined = [], []
        while self.active and self.active[0][0] <= self.step:
            ended.append(heappop(self.active)[1])
        while self.landed and len(self.active) < self.room:
            request = self.landed.popleft()
            joined.append(request)
            if answer[request] == 1:
                ended.append(request)
            else:
                heappush(self.active, (self.step + answer[request] - 1, request))
        self.since, self.step_s = now, self.steps[len(self.active)]
        self.next_at = now + (self.active[0][0] - self.step) * self.step_s if self.active else math.inf
        return joined, ended
