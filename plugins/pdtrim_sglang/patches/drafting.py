"""Hooks around drafted tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def begin_ngram(original: Callable[..., Any], algorithm: Any, batch: Any, last_tokens: Any, relay: Any) -> Any:
    """What decode's drafts of requests that come from prefill start from."""
    if not algorithm.is_ngram():
        return original(algorithm, batch, last_tokens, relay)
    from sglang.srt.runtime_context import get_spec

    from pdtrim_sglang.ngram import first_draft_input

    return first_draft_input(batch, relay, get_spec().speculative_num_draft_tokens)
