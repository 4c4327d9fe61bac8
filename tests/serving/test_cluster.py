"""A cluster of fake servers: the requests before it counts as serving, and the reports of faults."""

import json
import re
import shlex
import socket
import sys
import time
from pathlib import Path

import pytest

from pdtrim_deploy.errors import ServingError
from pdtrim_deploy.serving import Cluster, ClusterSpec, ServeEnvironment, WorkerOptions
from pdtrim_deploy.serving.process import session_members

FAKE = Path(__file__).with_name("fake_python.py")


@pytest.fixture
def cluster(tmp_path):
    """cluster({"decode": "refuses"}) and the like, not started; afterwards all of its processes must have ended."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(FAKE))} "$@"\n')
    python.chmod(0o755)
    clusters = []

    def make(faults=None, prefill=1, decode=1, timeout_s=120.0, gpus=None, **options):
        faults = faults or {}
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        (model / "faults.txt").write_text("".join(f"{stage}: {fault}\n" for stage, fault in faults.items()))
        spec = ClusterSpec.on_loopback(
            model,
            model,
            prefill=prefill,
            decode=decode,
            options=WorkerOptions(**{"device": "cpu"} | options),
            gpus=gpus,
            router_args=("--fault", faults.get("router", "")),
            start_timeout_s=timeout_s,
        )
        clusters.append(Recorded(spec, ServeEnvironment(python), tmp_path / "logs"))
        return clusters[-1]

    yield make
    for each in clusters:
        assert all(session_members(pid) == [] for pid in each.pids)
        assert each.temporary is None or not each.temporary.exists()


class Recorded(Cluster):
    """Records what it started."""

    def __init__(self, *args):
        super().__init__(*args)
        self.pids = []

    def _launch(self, name, command, env):
        super()._launch(name, command, env)
        self.pids.append(self._processes[name].pid)

    @property
    def temporary(self):
        return self._temporary


def requests(log):
    return [json.loads(line.removeprefix("asked ")) for line in log.read_text().splitlines() if line[:6] == "asked "]


def test_a_metrics_port_that_was_taken_meanwhile_is_another(cluster):
    starting = cluster()
    port = starting.spec.router.metrics_port
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with starting as running:
            assert running.spec.router.metrics_port not in {port, running.spec.router.port}
            assert f"127.0.0.1:{port}/" not in running.spec.router.metrics_url


def test_every_pair_and_the_router_generate_before_it_counts_as_serving(cluster):
    with cluster(prefill=2, decode=3) as running:
        workers = {worker.spec.name: worker for worker in running.workers}
        assert list(workers) == ["prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"]
        rooms = {name: {body["bootstrap_room"] for body in requests(worker.log)} for name, worker in workers.items()}
        for p in ("prefill-0", "prefill-1"):
            for d in ("decode-0", "decode-1", "decode-2"):
                assert len(rooms[p] & rooms[d]) == 1
        ports = {body["bootstrap_port"] for body in requests(workers["prefill-1"].log)}
        assert ports == {workers["prefill-1"].spec.bootstrap_port}
        assert len(requests(running.router_log)) == 3
        running.check()


def test_the_router_may_take_a_moment_to_know_its_workers(cluster):
    with cluster({"router": "late"}) as running:
        assert len(requests(running.router_log)) == 3


def test_a_worker_that_dies_at_start_is_named_with_its_reason(cluster):
    with pytest.raises(ServingError, match=r"^decode-0 ended with exit code 1: ValueError: weights of block 3"):
        cluster({"decode": "dies"}).__enter__()


def test_a_worker_that_dies_of_the_first_request_is_named(cluster, monkeypatch):
    """On a busy machine its process ends a while after its connection; nothing waits once it has."""
    monkeypatch.setattr("pdtrim_deploy.serving.cluster.GRACE_S", 120.0)
    begun = time.monotonic()
    with pytest.raises(ServingError, match=r"^decode-0 ended with exit code 7: RuntimeError: layer count 4"):
        cluster({"decode": "dies-when-asked"}).__enter__()
    assert time.monotonic() - begun < 120.0


def test_a_worker_that_refuses_is_quoted(cluster):
    with pytest.raises(ServingError, match=r"prefill-0 -> decode-0 cannot serve: decode-0 answered HTTP 503.*no plan"):
        cluster({"decode": "refuses"}).__enter__()


@pytest.mark.parametrize(
    ("faults", "sentence"),
    [
        ({"prefill": "never-healthy"}, "prefill-0 was not ready within {} s"),
        ({"decode": "hangs"}, "prefill-0 -> decode-0 gave no token within {} s|decode-0 answered timed out"),
        ({"router": "refuses"}, "the router answered HTTP 503.*within {} s"),
        ({"router": "hangs"}, "the router answered timed out within {} s"),
    ],
)
def test_nothing_waits_past_the_deadline(cluster, faults, sentence):
    """A later deadline, where the programs had not come so far by the one before: on a busy machine."""
    for timeout_s in (4, 15, 60):
        begun = time.monotonic()
        with pytest.raises(ServingError) as refused:
            cluster(faults, timeout_s=timeout_s).__enter__()
        assert time.monotonic() - begun < timeout_s + 60
        if re.search(sentence.format(timeout_s), str(refused.value)):
            break
    assert re.search(sentence.format(timeout_s), str(refused.value))


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_worker_on_a_shared_gpu_starts_when_the_one_before_it_has_taken_its_part(cluster, gpus):
    starting = cluster({"prefill": "never-healthy"}, timeout_s=3.0, gpus=gpus, device="cuda", share_gpus=True)
    with pytest.raises(ServingError, match="prefill-0 was not ready within 3 s"):
        starting.__enter__()
    assert (starting.log_dir / "decode-0.log").exists() == (gpus == 2)


def test_wait_tells_of_a_death_while_serving(cluster):
    with cluster() as running:
        running._processes["prefill-0"]._popen.kill()
        with pytest.raises(ServingError, match="prefill-0 was ended by SIGKILL"):
            running.wait()


def test_stopping_twice_is_harmless(cluster):
    with cluster() as running:
        running.stop()
        running.stop()
