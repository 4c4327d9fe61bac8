"""What a prefill worker says of its transfers, as Prometheus histograms (`--enable-metrics`, `/metrics`)."""

from __future__ import annotations


class TransferMetrics:
    """Observed once a request, when it ends.

    prometheus_client chooses between one and many processes when it is first imported, and SGLang sets that up
    before the scheduler starts: so it is imported here, not above.
    """

    def __init__(self) -> None:
        from prometheus_client import Counter, Histogram

        sizes = [float(1 << n) for n in range(10, 37, 2)]
        self._payload = Histogram("pdtrim_kv_payload_bytes", "Packed KV bytes sent for a request", buckets=sizes)
        self._wire = Histogram("pdtrim_kv_wire_bytes", "All bytes sent for a request, headers and aux", buckets=sizes)
        self._dense = Histogram("pdtrim_kv_dense_bytes", "Bytes the unpruned model would have sent", buckets=sizes)
        self._seconds = Histogram("pdtrim_kv_transfer_seconds", "First chunk queued to last chunk acknowledged")
        self._tokens = Histogram("pdtrim_kv_prompt_tokens", "Prompt tokens of a request", buckets=sizes)
        self._requests = Counter("pdtrim_kv_requests", "Requests by how their transfer ended", ["outcome"])

    def succeeded(self, payload: int, wire: int, dense: int, tokens: int, seconds: float) -> None:
        """One request whose KV arrived."""
        self._payload.observe(payload)
        self._wire.observe(wire)
        self._dense.observe(dense)
        self._tokens.observe(tokens)
        self._seconds.observe(seconds)
        self._requests.labels("success").inc()

    def failed(self) -> None:
        """One request whose transfer began and did not end well."""
        self._requests.labels("failed").inc()
