"""Requests that cut layers have no room for any more are retracted, come back, and answer as if nothing had been.

They have priorities, by which SGLang orders what waits.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from slowworker import scheduler, slowed

from pdtrim_deploy.worker.decode_pool import SplitPool

pytestmark = [pytest.mark.serve, pytest.mark.model, pytest.mark.timeout(900), pytest.mark.xdist_group("tiny bundle")]


@pytest.fixture(scope="module")
def short_pair(serving, request):
    """2,048 tokens in whole layers, 217 in cut ones, which SGLang fills: it reserves four tokens of an answer.

    The parameter has decode's arguments. Tests of the same ones share a pair, and leave it without a request.
    """
    options = {"max_total_tokens": 2048, "split_pool": SplitPool(isl=400, osl=16), "dtype": "float32", "sparse": True}
    arguments = ("--num-reserved-decode-tokens", "4", "--enable-priority-scheduling")
    arguments += ("--load-snapshot-publish-interval", "1")  # of steps: for `wait_until`
    options |= {"extra_args": arguments, "decode_args": request.param}
    bundle = request.getfixturevalue("untailed_bundle" if options["decode_args"] else "tiny_bundle")
    with serving(bundle.prefill_dir, bundle.decode_dir, **options) as pair:
        yield pair


def answer(pair, prompt, priority=0, tokens=120):
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "priority": priority}
    reply = httpx.post(f"{pair.url}/generate", json=body, timeout=300)
    assert reply.status_code == 200, reply.text
    return reply.json()["output_ids"]


def wait_until(pair, **counts):
    """Decode's scheduler writes, after each step, how many requests run and how many wait for room."""
    url, deadline = f"{pair.workers[1].spec.url}/v1/loads", time.monotonic() + 120
    while True:
        (load,) = httpx.get(url, timeout=60).json()["loads"]
        now = {"running": load["num_running_reqs"], "waiting": load["disaggregation"]["decode_prealloc_queue_reqs"]}
        if now == counts:
            return
        assert time.monotonic() < deadline, now
        time.sleep(0.005)


@pytest.mark.parametrize("short_pair", [()], indirect=True, ids=[""])
@pytest.mark.parametrize("priorities", [(0, 5), (5, 0)], ids=["the later is urgent", "the earlier is urgent"])
def test_what_waits_for_room_goes_by_priority(short_pair, priorities):
    """A request has nearly all of decode's tokens; two that need more than the rest wait, and only one fits then.

    Decode is slowed down, so that the first one is still there when the others come, on a busy machine too.
    """
    ended = []

    def run(name, length, priority, tokens):
        answer(short_pair, [3 + (7 * n + length) % 200 for n in range(length)], priority, tokens)
        ended.append(name)

    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(run, "blocks", 1500, 9, 170)]
        with slowed(scheduler(short_pair.workers[1].pid), 5):
            wait_until(short_pair, running=1, waiting=0)
            runs.append(pool.submit(run, 0, 1200, priorities[0], 4))
            wait_until(short_pair, running=1, waiting=1)
            runs.append(pool.submit(run, 1, 1201, priorities[1], 4))
            wait_until(short_pair, running=1, waiting=2)
    assert [run.result() for run in runs] == [None] * 3
    assert ended == ["blocks", *sorted((0, 1), key=lambda place: -priorities[place])]


@pytest.mark.parametrize(
    "short_pair", [(), ("--disaggregation-decode-enable-radix-cache",)], ids=["", "decode's radix cache"], indirect=True
)
def test_answers_are_those_of_requests_that_had_room(short_pair):
    prompts = [list(range(start, start + length)) for start, length in ((100, 40), (300, 77), (500, 9), (700, 120))]
    log = short_pair.workers[1].log
    started = len(log.read_text())
    alone = [answer(short_pair, prompt) for prompt in prompts]
    before = log.read_text()
    assert "Retract requests" not in before[started:]
    # Decode is slowed down, so that all are there at once, on a busy machine too.
    with slowed(scheduler(short_pair.workers[1].pid), 5), ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt, priority: answer(short_pair, prompt, priority), prompts, (1, 3, 0, 2)))
    assert "Retract requests" in log.read_text()[len(before) :]
    assert together == alone
