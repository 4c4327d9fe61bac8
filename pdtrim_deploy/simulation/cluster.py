"""The cluster's events: arrival, decode's pool, prefill, link, decode.

As SGLang's PD does it: the router takes workers in turns; decode first sets rows of its pool aside for prompt and
answer, then the prompt queues at prefill; its KV goes over the link when the whole prompt is computed, requests one by
one; its first token is out when its KV is here and decode is between two steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan.link import Link
from pdtrim_deploy.simulation.decode import DecodeWorker
from pdtrim_deploy.simulation.load import Load
from pdtrim_deploy.simulation.prefill import PrefillWorker
from pdtrim_deploy.simulation.result import Simulated
from pdtrim_deploy.sizing.rates import Rates


@dataclass(frozen=True)
class Cluster:
    """What is simulated.

    Attributes:
        request_bytes: prompt tokens -> KV bytes that travel; a plan's `payload_bytes`.
        link: one for all requests, or one of each prefill worker when `link_each`.

    """

    prefill: int
    decode: int
    rates: Rates
    request_bytes: Callable[[int], int]
    link: Link
    link_each: bool = False


def simulate(cluster: Cluster, load: Load) -> Simulated:
    """Every request of `load` from its arrival to its last token; deterministic.

    Raises:
        UserError: a request that no decode pool can hold.

    """
    return _Run(cluster, load).result()


class _Run:
    def __init__(self, cluster: Cluster, load: Load) -> None:
        rates, pool, rows = cluster.rates, cluster.rates.pool_tokens or math.inf, load.isl + load.osl
        if rows.max() > pool:
            raise UserError(
                f"a request has {rows.max()} tokens, a decode worker's pool_tokens are {pool:g}; raise them"
            )
        self.load, self.isl, self.osl, self.held = load, load.isl.tolist(), load.osl.tolist(), rows.tolist()
        size = {n: cluster.request_bytes(n) for n in set(self.isl)}
        self.bytes = [size[n] for n in self.isl]
        self.bytes_per_s = cluster.link.bytes_per_s
        self.overhead, self.landing = rates.overhead_ms / 1e3, rates.transfer_ms / 1e3
        steps_s = rates.steps_s()
        self.prefills = [PrefillWorker(rates) for _ in range(cluster.prefill)]
        self.decodes = [DecodeWorker(steps_s, pool) for _ in range(cluster.decode)]
        self.links = [0.0] * (cluster.prefill if cluster.link_each else 1)  # when each is free
        self.arrived, self.ready, self.prefilled, self.landed, self.first, self.done = np.zeros((6, len(self.isl)))
        self.begun = np.full(len(self.isl), -1.0)
        self.events: list[tuple[float, int, Callable[[float, int], None], int]] = []
        self.scheduled = self.sent = 0

    def result(self) -> Simulated:
        due = self.load.due
        for at in due.tolist() if due is not None else [0.0] * (self.load.clients or 1):
            self._send(at)
        while self.events:
            now, _, happen, who = heappop(self.events)
            happen(now, who)
        runs = np.array([run for worker in self.decodes for run in worker.runs] or [(0.0, 0)])
        total, stamps = sum(self.bytes), ("arrived", "ready", "begun", "prefilled", "landed", "first", "done")
        return Simulated(
            self.load.isl,
            self.load.osl,
            **{name: getattr(self, name) for name in stamps},
            gaps=runs,
            link_bytes=total,
            link_busy_s=total / self.bytes_per_s / len(self.links),
            prefill_busy_s=sum(worker.busy_s for worker in self.prefills) / len(self.prefills),
            decode_busy_s=sum(worker.busy_s for worker in self.decodes) / len(self.decodes),
        )

    def _at(self, time: float, happen: Callable[[float, int], None], who: int) -> None:
        self.scheduled += 1  # equal times: in the order of their making
        heappush(self.events, (time, self.scheduled, happen, who))

    def _send(self, at: float) -> None:
        if self.sent < len(self.isl):
            self._at(at, self._arrive, self.sent)
            self.sent += 1

    def _arrive(self, now: float, request: int) -> None:
        self.arrived[request] = now
        worker = self.decodes[request % len(self.decodes)]
        worker.waiting.append(request)
        self._admit(worker, now)

    def _admit(self, worker: DecodeWorker, now: float) -> None:
        while worker.waiting and self.held[worker.waiting[0]] <= worker.free:
            request = worker.waiting.popleft()
            worker.free -= self.held[request]
            self._at(now + self.overhead, self._queue, request)

    def _queue(self, now: float, request: int) -> None:
        self.ready[request] = now
        place = request % len(self.prefills)
        self.prefills[place].put(request, self.isl[request])
        self._compute(place, now)

    def _compute(self, place: int, now: float) -> None:
        worker = self.prefills[place]
        if worker.done is None and worker.queue:
            took, starting = worker.start()
            for request in starting:
                if self.begun[request] < 0:
                    self.begun[request] = now
            self._at(now + took, self._computed, place)

    def _computed(self, now: float, place: int) -> None:
        for request in self.prefills[place].finish():
            self.prefilled[request] = now
            wire = place % len(self.links)
            self.links[wire] = max(self.links[wire], now) + self.bytes[request] / self.bytes_per_s
            self._at(self.links[wire] + self.landing, self._land, request)
        self._compute(place, now)

    def _land(self, now: float, request: int) -> None:
        self.landed[request] = now
        place = request % len(self.decodes)
        worker = self.decodes[place]
        before = worker.next_at
        worker.land(request, now)
        if worker.next_at != before:
            self._at(worker.next_at, self._step, place)

    def _step(self, now: float, place: int) -> None:
        worker = self.decodes[place]
        if worker.next_at != now:
            return  # an earlier change took this one's place
        joined, ended = worker.change(now, self.osl)
        self.first[joined] = now
        self.done[ended] = now
        if worker.next_at < math.inf:
            self._at(worker.next_at, self._step, place)
        worker.free += sum(self.held[request] for request in ended)
        self._admit(worker, now)
        if self.load.due is None:
            for _ in ended:
                self._send(now)
