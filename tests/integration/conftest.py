"""A real bundle, built once a session with the command line, and clusters that serve it."""

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.cache import Cache
from pdtrim_deploy.serving import Cluster, ClusterSpec, ServeEnvironment, WorkerOptions
from pdtrim_deploy.serving.metrics import scrape

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def real_cache():
    return Cache.default()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle") / "quick"
    build = [
        sys.executable,
        "-m",
        "pdtrim_deploy",
        "build",
        str(ROOT / "recipes/smollm2-quick.yaml"),
        "--out",
        str(out),
    ]
    subprocess.run(build, check=True, timeout=600)
    return Bundle.open(out)


@pytest.fixture(scope="session")
def serving(tmp_path_factory):
    """`serving(prefill_dir, decode_dir, **options)`: a context manager that yields the running cluster."""

    @contextlib.contextmanager
    def start(prefill, decode, start_timeout_s=420.0, **options):
        spec = ClusterSpec.on_loopback(
            prefill, decode, options=WorkerOptions(**options), start_timeout_s=start_timeout_s
        )
        with Cluster(spec, ServeEnvironment.find(), tmp_path_factory.mktemp("logs")) as cluster:
            yield cluster

    return start


@pytest.fixture(scope="session")
def transfers():
    """`transfers(cluster)`: bytes so far by what is counted, over the first prefill worker, and requests by outcome."""

    def read(cluster):
        samples = scrape(cluster.workers[0].metrics_url)
        names = ("payload", "wire", "dense")
        sums = {name: sum(s.value for s in samples.get(f"pdtrim_kv_{name}_bytes_sum", ())) for name in names}
        return sums | {s.labels["outcome"]: s.value for s in samples.get("pdtrim_kv_requests_total", ())}

    return read
