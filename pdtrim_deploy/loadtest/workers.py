"""The workers' own figures of a load: Prometheus histograms, as the difference of two scrapes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from pdtrim_deploy.errors import ServingError

if TYPE_CHECKING:
    from pdtrim_deploy.serving import Cluster

SETTLE_S = 10.0
SIZES = ("payload_bytes", "wire_bytes", "dense_bytes", "reused_bytes", "early_bytes")
KV = {name: f"pdtrim_kv_{name}" for name in (*SIZES, "transfer_seconds")}
OUTCOMES = "pdtrim_kv_requests_total"
# SGLang 0.5.23, srt/observability/metrics_collector.py: the wait before a worker's first forward pass, by engine_type
# (prefill, decode), and the stages of a request.
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
    """Figures over all workers of the pair.

    Attributes:
        requests: transfers that succeeded; outcomes: the number of all transfers by outcome. Each rank of a prefill
            worker counts its own.
        payload_bytes, wire_bytes, dense_bytes: of successful transfers: packed KV, all bytes sent, bytes of dense KV.
        reused_bytes: packed KV that was not sent, since decode had it from an earlier request.
        early_bytes: of the payload: sent before the forward pass that computes it had ended.
        transfer: from the first chunk's queueing to the last one's acknowledgement.
        queues: how long requests waited for prefill (`prefill_queue`) and, once their KV was there, for decode
            (`decode_queue`), and SGLang's stages of a request, by name. Health checks of the router count too.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: int
    outcomes: dict[str, int]
    payload_bytes: int
    wire_bytes: int
    dense_bytes: int
    reused_bytes: int = 0
    early_bytes: int = 0
    transfer: Histogram | None
    queues: dict[str, Histogram]

    @classmethod
    def of(cls, added: Mapping[Key, float]) -> WorkerFigures:
        """Figures from the increase of the counters."""
        queues = {f"{kind}_queue": _histogram(QUEUE, kind, added) for kind in _kinds(QUEUE, added)}
        queues |= {stage: _histogram(STAGES, stage, added) for stage in _kinds(STAGES, added)}
        outcomes = {at: int(count) for (name, at), count in sorted(added.items()) if name == OUTCOMES}
        payload, wire, dense, reused, early = (int(added.get((f"{KV[name]}_sum", ""), 0)) for name in SIZES)
        return cls(
            requests=_transfers(added),
            outcomes={at: count for at, count in outcomes.items() if count},
            payload_bytes=payload,
            wire_bytes=wire,
            dense_bytes=dense,
            reused_bytes=reused,
            early_bytes=early,
            transfer=_histogram(KV["transfer_seconds"], "", added),
            queues={at: histogram for at, histogram in queues.items() if histogram is not None},
        )


@dataclass(frozen=True)
class Workers:
    """The /metrics URLs of all workers; `transfers`: KV goes from some of them to others."""

    urls: tuple[str, ...]
    transfers: bool = True

    @classmethod
    def of(cls, cluster: Cluster) -> Workers:
        """The workers of a running cluster."""
        return cls(tuple(worker.metrics_url for worker in cluster.workers), transfers=not cluster.spec.unified)

    def read(self) -> Mapping[Key, float]:
        """The current value of every counter, summed over the workers.

        Raises:
            ServingError: a worker's metrics do not answer.

        """
        from pdtrim_deploy.serving.metrics import scrape

        totals: defaultdict[Key, float] = defaultdict(float)
        for url in self.urls:
            try:
                families = scrape(url)
            except (OSError, HTTPException) as error:
                raise ServingError(f"{url} does not answer ({error}); start the worker with --enable-metrics") from None
            except ValueError as error:
                raise ServingError(f"{url} does not return Prometheus metrics ({error}); give a worker's URL") from None
            for name, samples in families.items():
                if name.startswith((*KV.values(), OUTCOMES, QUEUE, STAGES)):
                    labels = ("engine_type", "le") if name.startswith(QUEUE) else ("stage", "outcome", "le")
                    for sample in samples:
                        at = ":".join(sample.labels[label] for label in labels if label in sample.labels)
                        totals[name, at] += sample.value
        return totals

    def since(self, before: Mapping[Key, float], ended_well: int) -> dict[Key, float]:
        """The increase since `before`; waits briefly until `ended_well` transfers are counted."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            added = {key: value - before.get(key, 0.0) for key, value in self.read().items()}
            if not self.transfers or _transfers(added) >= ended_well or time.monotonic() > deadline:
                return added
            time.sleep(0.2)


def summed(parts: Iterable[Mapping[Key, float]]) -> dict[Key, float]:
    """The sum of all parts."""
    total: defaultdict[Key, float] = defaultdict(float)
    for part in parts:
        for key, value in part.items():
            total[key] += value
    return dict(total)


def _transfers(added: Mapping[Key, float]) -> int:
    return int(added.get((f"{KV['payload_bytes']}_count", ""), 0))


def _kinds(name: str, added: Mapping[Key, float]) -> list[str]:
    return sorted(at for full, at in added if full == f"{name}_count")


def _histogram(name: str, at: str, added: Mapping[Key, float]) -> Histogram | None:
    count = added.get((f"{name}_count", at))
    if not count:
        return None
    start = f"{at}:" if at else ""
    keys = [key for key in added if key[0] == f"{name}_bucket" and key[1].startswith(start)]
    bounds = sorted((float(key[1].removeprefix(start)), added[key]) for key in keys)
    return Histogram(
        count=int(count),
        mean_ms=round(added[f"{name}_sum", at] / count * 1e3, 3),
        p50_ms=_quantile(bounds, 0.5),
        p95_ms=_quantile(bounds, 0.95),
    )


def _quantile(bounds: list[tuple[float, float]], share: float) -> float | None:
    """As Prometheus' histogram_quantile; None if the quantile lies in the unbounded bucket."""
    if not bounds:
        return None
    rank = share * bounds[-1][1]
    for (low, below), (high, upto) in pairwise([(0.0, 0.0), *bounds]):
        if upto >= rank and upto > below:
            return (
                None if high == float("inf") else round((low + (high - low) * (rank - below) / (upto - below)) * 1e3, 3)
            )
    return None
