"""Loads that are hard on a pair: clients that hang up, a full pool, a prompt that no pool holds."""

import time
from dataclasses import replace

import pytest
from client import Request, draw, send
from stand import CHUNK, DEADLINE_S, POOL_TOKENS

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]


def test_half_of_the_clients_hang_up(stand):
    requests = draw(40, (2, 400), (4, 24), seed=9, aborts=0.5)
    row = stand.verdict("half of the clients hang up", send(stand.url, requests, DEADLINE_S))
    assert row.aborted >= 12
    assert row.answered == row.sent - row.aborted


def test_clients_hang_up_in_the_middle_of_a_long_prefill(stand):
    """Prefill hears of it two seconds later, so it is slowed down until then: most chunks are still to come."""
    long = draw(3, (1500, 1900), (4, 4), seed=19)
    requests = [replace(request, hangs_up=lambda: stand.proxy.hits > 2) for request in long]
    before = stand.outcomes()
    with stand.proxy.doing("count"), stand.slowed("prefill", 15):
        ended = send(stand.url, requests, DEADLINE_S)
        deadline = time.monotonic() + DEADLINE_S
        while sum((gone := stand.outcomes() - before).values()) < len(requests) and time.monotonic() < deadline:
            time.sleep(0.1)
    chunks = min(len(request.prompt) for request in requests) // CHUNK
    row = stand.verdict(f"clients hang up in the middle of prompts of {chunks} and more chunks", ended)
    assert row.aborted == row.sent
    assert not gone["success"], "a prompt was whole before its client's end was known"
    assert gone["aborted"] >= row.sent, gone


def test_a_full_pool_makes_requests_wait_and_loses_none(stand):
    """Prompts of the pool's size together, that grow beyond it: SGLang holds some back, or takes their pages away."""
    requests = draw(16, (300, 400), (100, 200), seed=10)
    assert sum(len(request.prompt) + request.new_tokens for request in requests) > 1.5 * POOL_TOKENS
    row = stand.verdict("decode pool full", send(stand.url, requests, 2 * DEADLINE_S, concurrency=16))
    assert row.answered == row.sent


def test_a_prompt_larger_than_the_pool_is_refused_at_once(stand):
    (base,) = draw(1, (1900, 1900), (4, 4), seed=11)
    requests = [Request(base.prompt * 3, 4), *draw(3, (10, 90), (2, 4), seed=12)]
    row = stand.verdict("prompt larger than the pool", send(stand.url, requests, DEADLINE_S))
    assert (row.failed, row.answered) == (1, 3)
    assert row.slowest_s < 30
