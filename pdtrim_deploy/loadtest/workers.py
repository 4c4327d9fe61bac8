"""What the workers counted during a load: their Prometheus histograms, the difference of two scrapes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.errors import ServingError

if TYPE_CHECKING:
    from pdtrim_deploy.serving import Cluster

SETTLE_S = 10.0
KV = {name: f"pdtrim_kv_{name}" for name in ("payload_bytes", "wire_bytes", "dense_bytes", "transfer_seconds")}
OUTCOMES = "pdtrim_kv_requests_total"
# SGLang 0.5.23, srt/observability/metrics_collector.py: every worker's queue, and the parts of a request's way.
QUEUE, STAGES = "sglang:queue_time_seconds", "sglang:per_stage_req_latency_seconds"

Key = tuple[str, str]  # full name of a sample, and the label that tells it from others of its name


class Histogram(BaseModel):
    """Seconds, in ms: the mean is exact, quantiles are interpolated within the histogram's buckets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int
    mean_ms: float
    p50_ms: float | None
    p95_ms: float | None


class WorkerFigures(BaseModel):
    """Over all workers of the pair.

    Attributes:
        requests: transfers that ended well; outcomes: all, by how they ended.
        payload_bytes, wire_bytes, dense_bytes: of those; packed KV, all that was sent, what no pruning would have sent.
        transfer: from the first chunk's queueing to the last one's acknowledgement.
        queues: time that requests waited for prefill, and SGLang's other stages of a request, by name.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: int
    outcomes: dict[str, int]
    payload_bytes: int
    wire_bytes: int
    dense_bytes: int
    transfer: Histogram | None
    queues: dict[str, Histogram]


@dataclass(frozen=True)
class Workers:
    """Where to read: the /metrics URLs of all workers of a pair."""

    urls: tuple[str, ...]

    @classmethod
    def of(cls, cluster: Cluster) -> Workers:
        """Those of a cluster that runs."""
        return cls(tuple(worker.metrics_url for worker in cluster.workers))

    def read(self) -> Mapping[Key, float]:
        """Every counter now, added over the workers.

        Raises:
            ServingError: a worker's metrics do not answer.

        """
        from pdtrim_deploy.serving.metrics import scrape

        found: defaultdict[Key, float] = defaultdict(float)
        for url in self.urls:
            try:
                said = scrape(url)
            except OSError as error:
                raise ServingError(f"{url} does not answer ({error}); start the worker with --enable-metrics") from None
            for name, samples in said.items():
                if name.startswith((*KV.values(), OUTCOMES, QUEUE, STAGES)):
                    for sample in samples:
                        labels = sample.labels
                        at = ":".join(labels[label] for label in ("stage", "outcome", "le") if label in labels)
                        found[name, at] += sample.value
        return found

    def since(self, before: Mapping[Key, float], ended_well: int) -> WorkerFigures:
        """What was added since `before`; waits a little until `ended_well` transfers are counted."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            now = self.read()
            figures = _figures(before, now)
            if figures.requests >= ended_well or time.monotonic() > deadline:
                return figures
            time.sleep(0.2)


def _figures(before: Mapping[Key, float], now: Mapping[Key, float]) -> WorkerFigures:
    def added(key: Key) -> float:
        return now.get(key, 0.0) - before.get(key, 0.0)

    def size(name: str) -> int:
        return int(added((f"{KV[name]}_sum", "")))

    stages = sorted({at for name, at in now if name == f"{STAGES}_count"})
    queues = {"queue": _histogram(QUEUE, "", added, now)} | {at: _histogram(STAGES, at, added, now) for at in stages}
    outcomes = {at: int(added((name, at))) for name, at in sorted(now) if name == OUTCOMES}
    return WorkerFigures(
        requests=int(added((f"{KV['payload_bytes']}_count", ""))),
        outcomes={at: count for at, count in outcomes.items() if count},
        payload_bytes=size("payload_bytes"),
        wire_bytes=size("wire_bytes"),
        dense_bytes=size("dense_bytes"),
        transfer=_histogram(KV["transfer_seconds"], "", added, now),
        queues={at: one for at, one in queues.items() if one is not None},
    )


def _histogram(name: str, at: str, added: Callable[[Key], float], now: Mapping[Key, float]) -> Histogram | None:
    count = added((f"{name}_count", at))
    if not count:
        return None
    start = f"{at}:" if at else ""
    keys = [key for key in now if key[0] == f"{name}_bucket" and key[1].startswith(start)]
    bounds = sorted((float(key[1].removeprefix(start)), added(key)) for key in keys)
    return Histogram(
        count=int(count),
        mean_ms=round(added((f"{name}_sum", at)) / count * 1e3, 3),
        p50_ms=_quantile(bounds, 0.5),
        p95_ms=_quantile(bounds, 0.95),
    )


def _quantile(bounds: list[tuple[float, float]], share: float) -> float | None:
    """As Prometheus' histogram_quantile: None where only the bucket without end reaches that far."""
    if not bounds:
        return None
    wanted = share * bounds[-1][1]
    for (low, below), (high, upto) in pairwise([(0.0, 0.0), *bounds]):
        if upto >= wanted and upto > below:
            return (
                None
                if high == float("inf")
                else round((low + (high - low) * (wanted - below) / (upto - below)) * 1e3, 3)
            )
    return None
