"""How far one request's transfer is, for prefill, its peers and the metrics."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass
class RoomProgress:
    """How far one request's transfer from one rank of prefill is, to all ranks of decode that it sends to.

    Of the prompt's tokens, decode has the rows of the first `reused_tokens` from an earlier request. Times are of the
    monotonic clock, in seconds. `early_bytes` had left before the forward pass that computed them had ended.
    `last_sent` is when a last chunk had left: from then on its reply is waited for. `lock` is over what peers count; a
    reply may overtake the return of its own send.
    """

    started: float | None = None
    queued: int = 0
    sent: int = 0
    acknowledged: int = 0
    payload_bytes: int = 0
    staged_bytes: int = 0
    draft_bytes: int = 0
    state_bytes: int = 0
    early_bytes: int = 0
    wire_bytes: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    last_sent: float | None = None
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @property
    def complete(self) -> bool:
        """Whether the last chunk, and so every chunk, was sent and acknowledged."""
        return self.last_sent is not None and self.queued == self.sent == self.acknowledged
