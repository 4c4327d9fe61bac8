"""Requests that must fail, each in its own way, beside healthy ones: none of them costs another client its answer."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from client import Request, draw, send
from stand import DEADLINE_S

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]
DAMAGED, CONTEXT, VOCABULARY = 333, 2048, 512
IDS = list(range(40, 60))
# Path, body, and the statuses that are right. What a client did wrong is a 4xx.
REFUSED = [
    ("v1/completions", {"model": "pdtrim", "prompt": "a", "temperature": -3}),
    ("v1/completions", {"model": "pdtrim", "prompt": "a" * (CONTEXT + 50)}),
    ("v1/completions", {"model": "pdtrim", "prompt": ""}),
    ("v1/completions", {"model": "pdtrim", "prompt": "a", "regex": "((("}),
    ("v1/completions", {"model": "pdtrim", "prompt": "a", "echo": True, "logprobs": 1}),
    ("v1/completions", {"model": "pdtrim", "prompt": "a", "stop_regex": "((("}),
    ("v1/completions", {"model": "pdtrim:no-such-adapter", "prompt": "a"}),
    ("v1/chat/completions", {"model": "pdtrim", "messages": []}),
    ("generate", {"text": ""}),
    ("generate", {"input_ids": IDS * 120}),
    ("generate", {"input_ids": [*IDS, VOCABULARY]}),
    ("generate", {"input_ids": [-1, *IDS]}),
    ("generate", {"input_ids": [IDS, []]}),
    ("generate", {"input_ids": IDS, "return_logprob": True, "top_logprobs_num": 129}),
    ("generate", {"input_ids": IDS, "return_logprob": True, "logprob_start_len": 99}),
]


def refused(url, path, body):
    """The status of a request that is its client's fault."""
    with httpx.Client(trust_env=False, timeout=DEADLINE_S) as client:
        reply = client.post(f"{url}/{path}", json=body)
    return reply.status_code, reply.text


def test_thirty_requests_that_must_fail_cost_thirty_healthy_ones_nothing(stand):
    """Failing: 15 that their clients got wrong, 8 whose transfer is damaged, 7 clients that hang up."""
    healthy = draw(30, (2, 300), (2, 12), seed=21)
    damaged = [Request(request.prompt, 4) for request in draw(8, (DAMAGED, DAMAGED), (4, 4), seed=22)]
    hanging = draw(7, (2, 300), (12, 24), seed=23, aborts=1.0)
    stand.proxy.marked_tokens = DAMAGED
    with stand.proxy.doing("marked"), ThreadPoolExecutor(4) as pool:
        wrongs = [pool.submit(refused, stand.url, *wrong) for wrong in REFUSED]
        others = pool.submit(send, stand.url, [*damaged, *hanging], DEADLINE_S, 4)
        ended = send(stand.url, healthy, DEADLINE_S, concurrency=4)
        late = send(stand.url, draw(6, (2, 300), (2, 12), seed=24), DEADLINE_S)  # when all damage has been done
        statuses, bad = [wrong.result() for wrong in wrongs], others.result()
        hits = stand.proxy.hits
    assert [outcome.reason for outcome in [*ended, *late] if outcome.how != "answered"] == []
    assert [(request, status) for request, status in zip(REFUSED, statuses, strict=True)
            if not 400 <= status[0] < 500] == []  # fmt: skip
    assert hits >= len(damaged)
    assert [outcome.how for outcome in bad] == ["failed"] * len(damaged) + ["aborted"] * len(hanging)
    assert all("checksum mismatch" in outcome.reason for outcome in bad[: len(damaged)])
    stand.verdict("30 requests that must fail beside 30 healthy ones", [*bad, *ended, *late])
