"""How far one request's transfer is, for prefill, its peers and the metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RoomProgress:
    """How far one request's transfer is; times are of the monotonic clock, in seconds.

    Of the prompt's tokens, decode has the rows of the first `reused_tokens` from an earlier request.
    `last_sent` is when the last chunk had left: from then on its reply is waited for.
    """

    started: float | None = None
    queued: int = 0
    sent: int = 0
    acknowledged: int = 0
    payload_bytes: int = 0
    staged_bytes: int = 0
    wire_bytes: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    last_sent: float | None = None
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether the last chunk, and so every chunk, was sent and acknowledged."""
        return self.last_sent is not None and self.queued == self.sent == self.acknowledged
