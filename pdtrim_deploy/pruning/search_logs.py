"""Names of the files that searches leave in a folder. No torch."""

from __future__ import annotations

DECODE_AGAIN = "decode-again"  # decode's search behind where prefill's began
SEARCHES = ("prefill", "decode", DECODE_AGAIN)


def search_log(name: str) -> str:
    """What that search did."""
    return f"search-{name}.jsonl"


def finalists_log(name: str) -> str:
    """What was evaluated of its finalists."""
    return f"search-{name}-finalists.jsonl"


LOGS = tuple(log(name) for name in SEARCHES for log in (search_log, finalists_log))
