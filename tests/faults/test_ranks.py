"""Faults of one rank alone, where a worker has two: what the other one has sent or taken is of no use to anybody."""

import os
import signal
import threading
import time

import pytest
from client import draw, send
from paths import PATHS
from stand import DEADLINE_S, STALL_S, streaming

pytestmark = [pytest.mark.serve, pytest.mark.faults, pytest.mark.timeout(900)]
UNLIKE = [name for name, path in PATHS.items() if path.tp_prefill != path.tp_decode]
pytestmark.append(pytest.mark.parametrize("stand", UNLIKE, indirect=True))
LOAD = {"tokens": (2, 400), "new_tokens": (2, 12)}


def divided(stand):
    """The stage that has two ranks."""
    return "prefill" if stand.path.tp_prefill > stand.path.tp_decode else "decode"


@pytest.mark.parametrize("fault", ["corrupt", "drop", "cut"])
def test_one_connection_of_two(stand, fault):
    """The other rank's rows arrive, and are acknowledged."""
    with stand.proxy.doing(fault, alone=True):
        ended = send(stand.url, draw(16, seed=31, **LOAD), DEADLINE_S)
        hits = stand.proxy.hits
    row = stand.verdict(f"transport bytes of one rank: {fault}", ended)
    assert hits, "the fault did not happen"
    assert row.failed, "the fault was not noticed"
    assert row.slowest_s < 8 * STALL_S


def test_one_rank_stands_still(stand):
    stage = divided(stand)
    pid = stand.scheduler(stage, rank=1)
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(20, os.kill, (pid, signal.SIGCONT))
    timer.start()
    ended = send(stand.url, draw(12, seed=32, **LOAD), DEADLINE_S)
    timer.join()
    stand.verdict(f"SIGSTOP one rank of {stage} for 20 s", ended)


def test_one_rank_killed(stand):
    """SGLang ends the worker with it."""
    stage = divided(stand)
    pid, requests = stand.scheduler(stage, rank=1), draw(16, (50, 200), (60, 80), seed=33)
    ended = stand.while_sending(requests, lambda: os.kill(pid, signal.SIGKILL), streaming)
    begun = time.monotonic()
    stand.cluster.restart(f"{stage}-0")
    stand.recover()
    row = stand.verdict(f"kill -9 one rank of {stage}, restarted", ended, time.monotonic() - begun)
    assert row.failed or stage == "prefill", "no stream was cut"
