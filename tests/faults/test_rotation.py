"""Without a circuit breaker, a dead or stuck worker is still taken out of rotation, and comes back."""

import contextlib
import os
import signal
import time

import httpx
import pytest
from client import draw, send
from stand import DEADLINE_S

from pdtrim_deploy.serving import Cluster, ClusterSpec, WorkerOptions
from pdtrim_deploy.serving.process import session_members

pytestmark = [pytest.mark.serve, pytest.mark.faults, pytest.mark.timeout(900)]
# Quicker than what `serve` sets, so that the test is.
HEALTH = ("--health-check-interval-secs", "2", "--health-check-timeout-secs", "4")


@pytest.fixture(scope="module")
def cluster(stages, environment, tmp_path_factory):
    """A prefill worker and two decode workers."""
    folder = stages["one"].folder
    options = WorkerOptions(dtype="float32", chunked_prefill_size=64, threads=1, max_total_tokens=4096)
    spec = ClusterSpec.on_loopback(
        folder / "prefill", folder / "decode", decode=2, options=options, router_args=HEALTH, start_timeout_s=600.0
    )
    with Cluster(spec, environment, tmp_path_factory.mktemp("logs")) as running:
        yield running


def signal_worker(cluster, name, what):
    """To all its processes."""
    (worker,) = (worker for worker in cluster.workers if worker.spec.name == name)
    for pid in session_members(worker.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, what)


def in_rotation(cluster):
    """Ports of the decode workers that the router takes for healthy."""
    workers = httpx.get(f"{cluster.url}/workers", timeout=10, trust_env=False).json()["workers"]
    return {worker["url"] for worker in workers if worker["worker_type"] == "decode" and worker["is_healthy"]}


def until_in_rotation(cluster, urls, within_s=60.0):
    """Wait until the router's healthy decode workers are these."""
    deadline = time.monotonic() + within_s
    while in_rotation(cluster) != urls:
        assert time.monotonic() < deadline, f"in rotation: {in_rotation(cluster)}, wanted: {urls}"
        time.sleep(0.5)


def load(cluster, seed):
    """How an ordinary load ended."""
    ended = send(cluster.url, draw(12, (2, 200), (2, 8), seed), DEADLINE_S, concurrency=3)
    return [outcome.reason for outcome in ended if outcome.how != "answered"]


def test_requests_of_a_dead_worker_go_to_others(cluster):
    """At once: the router tries another pair where one refuses the connection."""
    first, second = (worker.url for worker in cluster.spec.decode)
    signal_worker(cluster, "decode-1", signal.SIGKILL)
    assert load(cluster, 31) == []
    until_in_rotation(cluster, {first})
    assert load(cluster, 32) == []
    cluster.restart("decode-1")
    until_in_rotation(cluster, {first, second})
    assert load(cluster, 33) == []


def test_a_stuck_worker_is_taken_out(cluster):
    first, second = (worker.url for worker in cluster.spec.decode)
    signal_worker(cluster, "decode-1", signal.SIGSTOP)
    try:
        until_in_rotation(cluster, {first})
        assert load(cluster, 34) == []
    finally:
        signal_worker(cluster, "decode-1", signal.SIGCONT)
    until_in_rotation(cluster, {first, second})
    assert load(cluster, 35) == []
