"""SGLang's own Triton attention serves decode end to end, in Triton's interpreter on the CPU.

A model of four layers, one of which keeps all rows and three of which are cut by two rules: the interpreter takes about
a second a token. Chunks of 32 and pages of 4 end elsewhere than the rules do, and requests run beside each other.
"""

from dataclasses import replace

import pytest
from bundle_variants import variant

from pdtrim_deploy.bundle import Bundle
from pdtrim_deploy.evaluation.fidelity import run_fidelity
from pdtrim_deploy.pipeline import build
from pdtrim_deploy.plan import KVSend
from pdtrim_deploy.recipe import Recipe
from pdtrim_deploy.serving import Cluster, ClusterSpec, ServeEnvironment, WorkerOptions

pytestmark = [pytest.mark.serve, pytest.mark.model, pytest.mark.timeout(900)]

CUT = KVSend(mode="sparse", n_first=4, n_last=24)
SENDS = (KVSend(), CUT, KVSend(mode="sparse", n_last=30, wire_dtype="int8"), CUT)


@pytest.fixture(scope="module")
def small_bundle(tiny_model, real_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    sizes = {"num_hidden_layers": 5, "head_dim": 32, "vocab_size": 2048, "max_position_embeddings": 4096}
    recipe = {
        "name": "small",
        "model": {"source": f"hf:{tiny_model(folder / 'model', **sizes)}"},
        "calibration": {"corpus": "brown", "sequences": 2, "length": 64},
        "evaluation": {"corpus": "brown", "sequences": 2, "prompt_tokens": 64, "continuation_tokens": 16},
        "pruning": {"method": "cosine", "prefill_blocks": 1, "decode_blocks": 1},
        "kv": {"method": "all", "n_first": 4, "n_last": 24},
    }
    build(Recipe.model_validate(recipe), folder / "bundle", real_cache)
    bundle = Bundle.open(folder / "bundle")
    return variant(bundle, SENDS, folder / "cut")


@pytest.fixture
def triton_pair(small_bundle, no_shared_pairs, monkeypatch, tmp_path):
    """Decode alone has the backend: its `prefill` workers would run extend kernels, in minutes."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options = WorkerOptions(dtype="float32", page_size=4, chunked_prefill_size=32, device="cpu")
    spec = ClusterSpec.on_loopback(
        small_bundle.prefill_dir, small_bundle.decode_dir, options=options, start_timeout_s=600
    )
    arguments = ("--attention-backend", "triton", "--triton-attention-num-kv-splits", "2")
    prefill, decode = spec.workers
    decode = replace(decode, options=replace(options, extra_args=arguments))
    with Cluster(replace(spec, workers=(prefill, decode)), ServeEnvironment.find(), tmp_path) as cluster:
        yield cluster


def test_served_tokens_are_the_oracles(triton_pair, small_bundle, real_cache):
    log = triton_pair.workers[1].log.read_text()
    assert "pdtrim: TritonAttnBackend for whole layers, and one for each of 2 groups of cut layers" in log
    result = run_fidelity(small_bundle, triton_pair.url, real_cache, new_tokens=4)
    assert result.requests >= 24
    assert any(row.cached_tokens > 200 for row in result.rows), "no prefix-cache hit was tried"
    assert result.passed, result.problems
