"""What a worker says of its transfers, for Prometheus (`--enable-metrics`, `/metrics`)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pdtrim_sglang.progress import RoomProgress


@dataclass(frozen=True)
class Held:
    """Requests whose transfer is open, bytes of staging memory in use, workers of the other stage connected."""

    rooms: int
    staging_bytes: int
    peers: int


class HeldMetrics:
    """What a worker holds for transfers under way: all falls back to where it was when they have ended."""

    def __init__(self) -> None:
        from prometheus_client import Gauge

        self._lock = threading.Lock()

        mode: Literal["livesum"] = "livesum"  # ranks add up
        self._rooms = Gauge("pdtrim_kv_open_requests", "Requests whose transfer is open", multiprocess_mode=mode)
        self._staging = Gauge("pdtrim_kv_staging_held_bytes", "Staging memory in use", multiprocess_mode=mode)
        self._peers = Gauge(
            "pdtrim_kv_peers", "Workers of the other stage that it keeps a connection for", multiprocess_mode=mode
        )

    def held(self, count: Callable[[], Held]) -> None:
        """Write down what it is now. Threads take turns, so that the last one writes what it is after them all."""
        with self._lock:
            now = count()
            self._rooms.set(now.rooms)
            self._staging.set(now.staging_bytes)
            self._peers.set(now.peers)


class TransferMetrics(HeldMetrics):
    """Observed once a request, when it ends.

    prometheus_client chooses between one and many processes when it is first imported, and SGLang sets that up
    before the scheduler starts: so it is imported here, not above.
    """

    def __init__(self) -> None:
        from prometheus_client import Counter, Histogram

        super().__init__()
        sizes = [float(1 << n) for n in range(10, 37, 2)]
        self._payload = Histogram("pdtrim_kv_payload_bytes", "Packed KV, and states, sent for a request", buckets=sizes)
        self._wire = Histogram("pdtrim_kv_wire_bytes", "All bytes sent for a request, headers and aux", buckets=sizes)
        self._dense = Histogram("pdtrim_kv_dense_bytes", "Bytes the unpruned model would have sent", buckets=sizes)
        self._staged = Histogram("pdtrim_kv_staged_bytes", "Of the payload: packed by the engine itself", buckets=sizes)
        self._draft = Histogram(
            "pdtrim_kv_draft_bytes", "Of the payload: KV of a draft model, native", buckets=[0.0, *sizes]
        )
        self._states = Histogram(
            "pdtrim_kv_state_bytes", "Of the payload: states of linear attention, native", buckets=[0.0, *sizes]
        )
        self._early = Histogram(
            "pdtrim_kv_early_bytes",
            "Of the payload: sent before its forward pass had ended",
            buckets=[0.0, *sizes],
        )
        self._seconds = Histogram("pdtrim_kv_transfer_seconds", "First chunk queued to last chunk acknowledged")
        self._tokens = Histogram("pdtrim_kv_prompt_tokens", "Prompt tokens of a request", buckets=sizes)
        self._reused_tokens = Histogram(
            "pdtrim_kv_reused_tokens", "Prompt tokens of a request whose rows decode had", buckets=[0.0, *sizes]
        )
        self._spared = Histogram(
            "pdtrim_kv_reused_bytes", "Packed KV bytes not sent, since decode had the rows", buckets=[0.0, *sizes]
        )
        self._requests = Counter("pdtrim_kv_requests", "Requests by how their transfer ended", ["outcome"])

    def succeeded(self, progress: RoomProgress, dense_bytes: int, spared_bytes: int) -> None:
        """One request whose KV arrived.

        `dense_bytes` is what the unpruned model would have sent of the same rows; `spared_bytes` what this one would
        have sent of those that decode had.
        """
        self._payload.observe(progress.payload_bytes)
        self._staged.observe(progress.staged_bytes)
        self._draft.observe(progress.draft_bytes)
        self._states.observe(progress.state_bytes)
        self._early.observe(progress.early_bytes)
        self._wire.observe(progress.wire_bytes)
        self._dense.observe(dense_bytes)
        self._tokens.observe(progress.prompt_tokens)
        self._reused_tokens.observe(progress.reused_tokens)
        self._spared.observe(spared_bytes)
        self._seconds.observe(progress.seconds)
        self.ended("success")

    def ended(self, outcome: str) -> None:
        """One request is over: `success`, `failed` or `aborted`."""
        self._requests.labels(outcome).inc()
