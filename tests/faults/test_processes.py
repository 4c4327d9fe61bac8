"""Workers and router that are killed, stopped, or come back as something else."""

import signal
import time
from dataclasses import replace

import pytest
from client import draw, send
from stand import DEADLINE_S, ROUTER_S, streaming

from pdtrim_deploy.errors import ServingError
from pdtrim_deploy.plan import STAGES

pytestmark = [pytest.mark.serve, pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_worker_that_stands_still(stand, stage):
    """SIGSTOP for 20 s, longer than heartbeat and transport allow: requests may fail, but with a word."""
    requests = draw(12, (2, 400), (2, 12), seed=4)
    with stand.paused(stage, 20.0):
        begun = time.monotonic()
        assert not stand.health(stage, timeout_s=3.0), "a worker that stands still calls itself healthy"
        ended = send(stand.url, requests, DEADLINE_S)
        assert time.monotonic() - begun < DEADLINE_S
    stand.verdict(f"SIGSTOP {stage} for 20 s", ended)


@pytest.mark.parametrize("stage", STAGES)
def test_a_worker_that_stood_still_before_its_requests_came(stand, stage):
    """SIGSTOP until every client has heard. The router waits for both workers, so it is its deadline that counts."""
    with stand.stopped(stage):
        ended = send(stand.url, draw(4, (2, 400), (2, 12), seed=17), ROUTER_S + 10)
    row = stand.verdict(f"SIGSTOP {stage} before bootstrap, router's deadline {ROUTER_S} s", ended)
    assert row.failed == row.sent


def test_prefill_killed_in_the_middle_of_transfers(stand):
    requests = draw(24, (300, 400), (8, 12), seed=5)
    with stand.proxy.doing("delay"):  # so that chunks are on their way
        ended = stand.while_sending(
            requests, lambda: stand.signal("prefill", signal.SIGKILL), lambda begun: stand.proxy.hits > 4
        )
    assert not stand.health("prefill"), "a dead worker is healthy"
    assert any(outcome.how == "failed" for outcome in ended), "nothing was in the middle of anything"
    begun = time.monotonic()
    stand.cluster.restart("prefill-0")
    stand.recover()
    stand.verdict("kill -9 prefill in the middle of transfers, restarted", ended, time.monotonic() - begun)


def test_decode_killed_in_the_middle_of_streams_and_back_with_another_plan_behind_one_router(stand):
    requests = draw(16, (50, 200), (60, 80), seed=6)
    ended = stand.while_sending(requests, lambda: stand.signal("decode", signal.SIGKILL), streaming)
    assert not stand.health("decode"), "a dead worker is healthy"
    assert any(outcome.how == "failed" and outcome.tokens for outcome in ended), "no stream was cut"
    spec = stand.worker("decode").spec
    other = stand.stages["other"]
    with pytest.raises(ServingError, match="plans differ"):
        stand.cluster.restart("decode-0", replace(spec, model_path=other.folder / "decode"))
    refused = send(stand.url, draw(6, (2, 200), (2, 6), seed=7), DEADLINE_S)
    begun = time.monotonic()
    stand.cluster.restart("decode-0", spec)
    stand.recover()
    stand.verdict("kill -9 decode in the middle of streams, restarted", ended, time.monotonic() - begun)
    row = stand.verdict("decode restarted with another plan", refused)
    assert row.failed == row.sent, "KV of one plan was taken for another's"


def test_the_router_comes_back(stand):
    requests = draw(16, (50, 300), (20, 30), seed=8)
    ended = stand.while_sending(requests, lambda: stand.signal_router(signal.SIGKILL), streaming)
    begun = time.monotonic()
    stand.cluster.restart("router")
    row = stand.verdict("kill -9 the router, restarted", ended, time.monotonic() - begun)
    assert row.failed, "the router was not in use"
