"""Stages computed by onnxruntime inside SGLang workers answer as the oracle does, whatever the other stage runs on."""

import random
from dataclasses import replace

import httpx
import pytest
from pdtrim_builders import build_target

from pdtrim_deploy.checkpoints import open_checkpoint
from pdtrim_deploy.checkpoints.loading import load_model
from pdtrim_deploy.checkpoints.surgery import write_stage
from pdtrim_deploy.evaluation.fidelity import judge, run_fidelity
from pdtrim_deploy.evaluation.fidelity.cases import groups, text_needed
from pdtrim_deploy.evaluation.fidelity.client import ask
from pdtrim_deploy.evaluation.oracle import PDOracle
from pdtrim_deploy.plan import STAGES, Drop, Keep, KVSend, PDPlan
from pdtrim_deploy.serving import Cluster, ClusterSpec, Engine, Executors, ServeEnvironment, WorkerOptions, cluster_of
from pdtrim_deploy.serving.metrics import scrape

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]


def sums(worker, *names):
    samples = scrape(worker.metrics_url)
    return [sum(sample.value for sample in samples.get(name, ())) for name in names]


@pytest.mark.model
def test_smollm2_with_onnxruntime_in_both_stages(bundle, real_cache, tmp_path):
    """Chunks of 64 tokens on pages of 16, so that spans, pages and chunks end in different places."""
    options = WorkerOptions(page_size=16, chunked_prefill_size=64)
    executors = Executors("onnxruntime", "onnxruntime")
    with cluster_of(bundle, executors=executors, options=options, log_dir=tmp_path) as cluster:
        result = run_fidelity(bundle, cluster.url, real_cache, new_tokens=8)
        assert any(row.cached_tokens > 200 for row in result.rows), "no prefix-cache hit was tried"
        assert result.max_logprob_error <= result.tolerance, result.rows
        assert all(result.controls_detected.values()), result.controls
        names = ("pdtrim_kv_staged_bytes_sum", "pdtrim_kv_payload_bytes_sum")
        staged, payload = sums(cluster.workers[0], *names)
        assert 0 < staged < payload, "cached prefixes come from the pool, all else from the engine"
        fresh = {"input_ids": list(range(700, 833)), "sampling_params": {"max_new_tokens": 2, "temperature": 0}}
        assert httpx.post(f"{cluster.url}/generate", json=fresh, timeout=120).status_code == 200
        after = sums(cluster.workers[0], *names)
        assert after[0] - staged == after[1] - payload == bundle.plan.payload_bytes(133), "the engine packed all rows"


@pytest.fixture(scope="module")
def tiny(tiny_model, tmp_path_factory, real_cache):
    """Stage checkpoints of a tiny Qwen3 by stage, their plan, and their engines."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model(folder / "model", "Qwen3ForCausalLM", max_position_embeddings=2048)
    checkpoint = open_checkpoint(model, real_cache)
    prefill, decode = (tuple(Drop() if block in gone else Keep() for block in range(6)) for gone in ((3,), (1, 3)))
    sparse = KVSend(mode="sparse", n_first=4, n_last=24)
    kv = (KVSend(), sparse, sparse.model_copy(update={"n_last": 9}), sparse)
    plan = PDPlan(model=checkpoint.shape("float32"), prefill=prefill, decode=decode, kv=kv)
    engines = {}
    for stage in STAGES:
        write_stage(checkpoint, folder / stage, plan.layers(stage), "float32", plan.model_dump(mode="json"))
        build_target("onnx", folder / stage, folder / "engines" / stage)
        engines[stage] = Engine("onnxruntime", stage, folder / "engines" / stage)
    return folder, plan, engines


@pytest.fixture(scope="module")
def mixed(tiny, tmp_path_factory):
    """Two pairs behind one router, which pairs workers of like number: torch -> onnxruntime, onnxruntime -> torch."""
    folder, _, engines = tiny
    options = WorkerOptions(dtype="float32", chunked_prefill_size=64, threads=1)
    spec = ClusterSpec.on_loopback(folder / "prefill", folder / "decode", prefill=2, decode=2, options=options)
    chosen = {"prefill-1": engines["prefill"], "decode-0": engines["decode"]}
    spec = replace(spec, workers=tuple(replace(worker, engine=chosen.get(worker.name)) for worker in spec.workers))
    with Cluster(spec, ServeEnvironment.find(), tmp_path_factory.mktemp("logs")) as cluster:
        yield cluster


def test_onnxruntime_in_prefill_only_and_in_decode_only(tiny, mixed):
    folder, plan, _ = tiny
    draw = random.Random(0)
    count, length = text_needed(plan)
    texts = [[draw.randrange(3, 259) for _ in range(length)] for _ in range(count)]
    served = []
    for group in groups(plan, texts):
        # each prompt twice: once to each pair, so that each has its own prefix-cache hits
        twice = replace(group, prompts=tuple(prompt for prompt in group.prompts for _ in range(2)))
        served += [(group, one) for one in ask(mixed.url, twice, 6, 120)]
    models = (load_model(folder / stage, "float32") for stage in STAGES)
    result = judge(PDOracle(*models, plan), served)
    assert result.max_logprob_error <= result.tolerance, result.rows
    assert result.controls_detected["dense plan"], result.controls
    assert sum(row.cached_tokens > 190 for row in result.rows) >= 4, "prefix-cache hits were not tried in both pairs"
    (torch_staged,), (engine_staged,) = (sums(w, "pdtrim_kv_staged_bytes_sum") for w in mixed.workers[:2])
    assert torch_staged == 0 < engine_staged


def test_the_pairs_were_the_mixed_ones(mixed):
    """Workers of one pair see the same prompts: lengths that differ tell them apart."""
    prefill, decode = mixed.workers[:2], mixed.workers[2:]

    def seen():
        sent = [sums(worker, "pdtrim_kv_prompt_tokens_sum")[0] for worker in prefill]
        return sent, [sums(worker, "sglang:prompt_tokens_total")[0] for worker in decode]

    before = seen()
    for length in (10, 30, 50, 90):
        body = {"input_ids": list(range(5, 5 + length)), "sampling_params": {"max_new_tokens": 2, "temperature": 0}}
        assert httpx.post(f"{mixed.url}/generate", json=body, timeout=120).status_code == 200
    sent, received = ([b - a for a, b in zip(x, y, strict=True)] for x, y in zip(before, seen(), strict=True))
    assert sorted(sent) == [60, 120]
    assert received == sent
