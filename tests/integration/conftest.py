"""Bundles, built once a session, and clusters that serve them."""

import contextlib
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from bundle_variants import mixed, variant

from pdtrim_deploy.bundle import RECIPE, Bundle
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.serving import Cluster, ClusterSpec, ServeEnvironment, WorkerOptions
from pdtrim_deploy.serving.metrics import scrape
from pdtrim_deploy.serving.process import stop_all
from pdtrim_deploy.worker.decode_pool import SplitPool

sys.path.insert(0, str(Path(__file__).parent))
from preloading import Preloading
from shared_pairs import SharedPairs

ROOT = Path(__file__).parents[2]
SPLIT = SplitPool(isl=400, osl=16)  # of `mixed_pair`
# From SIGTERM to SIGKILL, in clusters of these fixtures: SGLang looks for the first every five seconds and takes ten to
# end, so these workers are killed. That SIGTERM makes them end is tested in test_tutorial.py alone.
STOP_S = 0.3


# Groups from the longest to the shortest: xdist hands them out in this order, so that the last ones are short and no
# process waits long for the other's. Those that share a pair come first: it ends before others start their own.
LONGEST_FIRST = (
    "smollm2", "tiny bundle", "test_families", "test_fp8", "test_demo", "test_dp_attention", "test_conversations",
    "test_key_offsets", "test_clients", "test_refusals", "test_engines", "test_speculation", "test_triton_attention",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """Order of groups; under `-n 2 --dist loadgroup` a group's tests run in one process.

    A module is a group, unless its tests say with which they share.
    """

    def place(item):
        (group,) = (mark.args[0] for mark in item.iter_markers("xdist_group"))
        return LONGEST_FIRST.index(group) if group in LONGEST_FIRST else len(LONGEST_FIRST)

    for item in items:
        if not any(item.iter_markers("xdist_group")):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: (place(item), "shared_pair" not in item.fixturenames))


@pytest.fixture(scope="session")
def real_cache():
    return Cache.default()


@pytest.fixture(scope="session")
def smollm2_bundle(tmp_path_factory):
    """Of SmolLM2-135M, built with the command line: both prunings, native wire, onnx engines."""
    out = tmp_path_factory.mktemp("bundle") / "quick"
    command = [
        sys.executable,
        "-m",
        "pdtrim_deploy",
        "build",
        str(ROOT / "recipes/smollm2-quick.yaml"),
        "--out",
        str(out),
    ]
    subprocess.run(command, check=True, timeout=600)
    return Bundle.open(out)


@pytest.fixture(scope="session")
def bundle(smollm2_bundle):
    return smollm2_bundle


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model, real_cache, tmp_path_factory):
    """Of a random Llama of 14 blocks, with a vocabulary that holds the token numbers which tests send.

    Its RoPE is scaled as Llama 3.1's, behind a first context that most prompts pass. Three blocks of prefill make K and
    V alone, but for the last 50 tokens of a prompt.
    """
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"num_hidden_layers": 14, "head_dim": 32, "vocab_size": 2048, "max_position_embeddings": 4096}
    sizes["rope_parameters"] = {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    recipe = {
        "name": "tiny",
        "model": {"source": f"hf:{tiny_model(folder / 'model', **sizes)}"},
        "calibration": {"corpus": "brown", "sequences": 2, "length": 64},
        "evaluation": {"corpus": "brown", "sequences": 2, "prompt_tokens": 64, "continuation_tokens": 16},
        "pruning": {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 2},
        "healing": {"kv_only_blocks": 3, "kv_only_tail": 50, "sequences": 8, "length": 32},
        "kv": {"method": "all", "n_first": 4, "n_last": 24},
    }
    build(Recipe.model_validate(recipe), folder / "bundle", real_cache)
    return Bundle.open(folder / "bundle")


@pytest.fixture(scope="session")
def untailed_bundle(tiny_bundle, real_cache, tmp_path_factory):
    """`tiny_bundle` whose prefill runs all its blocks whole: decode may have a radix cache of its own."""
    whole = Recipe.load(tiny_bundle.path / RECIPE).changed("this test", "healing", kv_only_blocks=0, kv_only_tail=0)
    return build(whole, tmp_path_factory.mktemp("untailed") / "bundle", real_cache)


@pytest.fixture(scope="session")
def more_kv_only_bundle(tiny_bundle, real_cache, tmp_path_factory):
    """`tiny_bundle` with so many KV-only blocks that `fidelity` tells a tail from one that is a token shorter."""
    more = Recipe.load(tiny_bundle.path / RECIPE).changed("this test", "healing", kv_only_blocks=7)
    return build(more, tmp_path_factory.mktemp("more") / "bundle", real_cache)


@pytest.fixture(scope="session")
def mixed_bundle(tiny_bundle, tmp_path_factory):
    """`tiny_bundle` with all wire dtypes, and rows that differ from layer to layer."""
    return variant(tiny_bundle, mixed(tiny_bundle), tmp_path_factory.mktemp("mixed") / "bundle")


@pytest.fixture(scope="session", autouse=True)
def preloading(tmp_path_factory):
    """Workers of this process's clusters are forks of one program that has imported SGLang (preloading.py)."""
    forks = Preloading(tmp_path_factory.mktemp("preloaded") / "log")
    with pytest.MonkeyPatch.context() as patch, contextlib.closing(forks):
        patch.setattr("pdtrim_deploy.serving.cluster.ServerProcess", forks.start)
        patch.setattr("pdtrim_deploy.serving.cluster.stop_all", lambda group, _: stop_all(group, STOP_S))
        yield


@pytest.fixture(scope="session")
def shared_pairs(preloading, tmp_path_factory):
    """All shared pairs of this process (shared_pairs.py)."""

    @contextlib.contextmanager
    def start(prefill, decode, start_timeout_s=420.0, staging_bytes=None, **options):
        spec = ClusterSpec.on_loopback(
            prefill, decode, options=WorkerOptions(**options), start_timeout_s=start_timeout_s
        )
        if staging_bytes is not None:
            transport = {"staging_bytes": staging_bytes}
            spec = replace(spec, workers=tuple(replace(worker, transport=transport) for worker in spec.workers))
        with Cluster(spec, ServeEnvironment.find(), tmp_path_factory.mktemp("logs")) as cluster:
            yield cluster

    with contextlib.closing(SharedPairs(start)) as pairs:
        yield pairs


@pytest.fixture(scope="session")
def shared_pair(shared_pairs):
    """`shared_pair(prefill_dir, decode_dir, **options)`: a running cluster that other tests use too."""
    return shared_pairs.get


@pytest.fixture(scope="session")
def serving(shared_pairs):
    """`serving(prefill_dir, decode_dir, **options)`: a context manager that yields a cluster of one's own."""
    return shared_pairs.unshared


@pytest.fixture
def no_shared_pairs(shared_pairs):
    """For tests that start servers by themselves: shared pairs end, to leave them the memory."""
    shared_pairs.close()


@pytest.fixture
def mixed_pair(shared_pair, mixed_bundle):
    """A shared pair of `mixed_bundle`: pages of 16, chunks of 64, decode's pool split (for SPLIT)."""
    options = {"page_size": 16, "chunked_prefill_size": 64, "split_pool": SPLIT}
    options["plan_digest"] = mixed_bundle.plan.digest
    return shared_pair(mixed_bundle.prefill_dir, mixed_bundle.decode_dir, dtype="float32", **options)


@pytest.fixture(scope="session")
def transfers():
    """`transfers(cluster, more=0, than={})` of the first prefill worker, bytes by what is counted, requests by outcome.

    Prefill counts a request when decode acknowledges its last rows, which may be after the answer: so counters are read
    once they have stood still, and `more` requests have succeeded than there were in `than`; after 120 s as they are.
    """

    def read(cluster):
        samples = scrape(cluster.workers[0].metrics_url)
        names = ("payload", "wire", "dense")
        sums = {name: sum(s.value for s in samples.get(f"pdtrim_kv_{name}_bytes_sum", ())) for name in names}
        return sums | {s.labels["outcome"]: s.value for s in samples.get("pdtrim_kv_requests_total", ())}

    def settled(cluster, more=0, than=MappingProxyType({})):
        deadline, seen = time.monotonic() + 120, None
        while (now := read(cluster)) != seen or now.get("success", 0) < than.get("success", 0) + more:
            if time.monotonic() > deadline:
                break
            seen = now
            time.sleep(1.0)
        return now

    return settled
