"""What both sides of a transfer use of SGLang's KV manager (CommonKVManager of SGLang 0.5.23, and ours on it)."""

from __future__ import annotations

from typing import Any, Protocol


class Worker(Protocol):
    """One rank of a worker: its addresses, and SGLang's tables of requests by room."""

    local_ip: str
    rank_port: int
    attn_tp_size: int
    attn_tp_rank: int
    bootstrap_timeout: float
    server_socket: Any
    transfer_infos: dict[int, Any]
    request_status: dict[int, Any]
    failure_records: dict[int, Any]
    req_to_decode_prefix_len: dict[int, int]

    @property
    def prefill_rank(self) -> int:
        """Rank of this prefill process, as decode counts responses."""
        ...

    def update_status(self, bootstrap_room: int, status: int) -> None:
        """A request's state moves on."""

    def conclude_failure(self, *, bootstrap_room: int, failure_reason: str) -> Any:
        """A request has failed, and its other half is told."""

    def conclude_transfer(self, *, bootstrap_room: int, status: int, targets: Any) -> Any:
        """A request's transfer is over."""

    def apply_prefill_status(
        self, *, bootstrap_room: int, status: int, prefill_rank: int, failure_reason: str | None
    ) -> Any:
        """What prefill says of a request that decode waits for."""

    def parse_kv_status_message(self, msg: list[bytes]) -> tuple[int, int, int, str | None] | None:
        """Room, state, prefill's rank and the reason of a failure; None where the message is another."""
