"""Stages computed by onnxruntime inside SGLang workers answer as the oracle does, whatever the other stage runs on."""

import random
from dataclasses import replace

import httpx
import pytest
from packcases import random_offsets
from pdtrim_builders import build_target

from pdtrim_deploy.evaluation import corpora
from pdtrim_deploy.evaluation.fidelity import judge
from pdtrim_deploy.evaluation.fidelity.cases import groups, text_needed
from pdtrim_deploy.evaluation.fidelity.client import ask
from pdtrim_deploy.kvcache.key_offsets import KeyOffsets
from pdtrim_deploy.models import open_checkpoint
from pdtrim_deploy.models.loading import load_model, load_tokenizer
from pdtrim_deploy.models.oracle import PDOracle
from pdtrim_deploy.models.surgery import write_stage
from pdtrim_deploy.plan import STAGES, Distilled, Drop, Keep, KVOnly, KVSend, PDPlan, WithoutAttention, WithoutMLP
from pdtrim_deploy.plan.kv import KEY_OFFSETS
from pdtrim_deploy.serving import Cluster, ClusterSpec, Engine, Executors, ServeEnvironment, WorkerOptions, cluster_of
from pdtrim_deploy.serving.metrics import scrape

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900), pytest.mark.usefixtures("no_shared_pairs")]


SOME = ("longer than a chunk", "prefix-cache hits", "one batch, unlike lengths")  # of `groups`


def sums(worker, *names):
    samples = scrape(worker.metrics_url)
    return [sum(sample.value for sample in samples.get(name, ())) for name in names]


@pytest.mark.model
@pytest.mark.xdist_group("smollm2")
def test_smollm2_with_onnxruntime_in_both_stages(bundle, real_cache, tmp_path):
    """Chunks of 64 tokens on pages of 16, so that spans, pages and chunks end in different places.

    Half of the prompts of a whole check: chunks, prefix hits and one batch. Torch and tiny engines are asked them all.
    """
    assert all(engine.numerics.hidden_error < 5e-5 for engine in bundle.engines.values()), "prompts at build time"
    options = WorkerOptions(page_size=16, chunked_prefill_size=64)
    executors = Executors("onnxruntime", "onnxruntime")
    count, length = text_needed(bundle.plan)
    documents = corpora.load("brown", real_cache).split("final")
    texts = corpora.sequences(documents, load_tokenizer(bundle.prefill_dir), count, length, 0).tolist()
    with cluster_of(bundle, executors=executors, options=options, log_dir=tmp_path) as cluster:
        some = [group for group in groups(bundle.plan, texts) if group.name in SOME]
        served = [(group, answer) for group in some for answer in ask(cluster.url, group, 6, 120)]
        models = (load_model(bundle.stage_dir(stage), "float32") for stage in STAGES)
        result = judge(PDOracle(*models, bundle.plan, KeyOffsets.read(bundle.prefill_dir, bundle.plan)), served)
        assert [group.name for group in some] == list(SOME)
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
    """Stage checkpoints of a tiny Qwen3 by stage, their plan, and their engines; decode has a student of 1 and 2.

    Prefill runs block 4 for its K and V alone: in torch the plugin skips the rest, an engine's graph has op KVWrite.
    Block 6 is gone from prefill, and decode runs its MLP alone, like that of 5; 0 has no MLP in decode, 5 in prefill.
    """
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny_model(folder / "model", "Qwen3ForCausalLM", max_position_embeddings=2048, num_hidden_layers=8)
    checkpoint = open_checkpoint(model, real_cache)
    student, kept = Distilled(pair=(1, 2), kv_from=1), Keep()
    prefill = (kept, kept, kept, Drop(), KVOnly(), WithoutMLP(), Drop(), kept)
    decode = (WithoutMLP(), student, student, Drop(), kept, WithoutAttention(), WithoutAttention(), kept)
    dense = load_model(model).model.layers
    weights = dense[2].mlp.state_dict()
    silent = {name: dense[4].get_parameter(name) * 0 for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")}
    students = {"prefill": {4: silent}, "decode": {1: {f"mlp.{name}": tensor for name, tensor in weights.items()}}}
    sparse = KVSend(mode="sparse", n_first=4, n_last=24)
    quantised = sparse.model_copy(update={"wire_dtype": "int4"})
    kv = (KVSend(wire_dtype="int8"), sparse, sparse.model_copy(update={"n_last": 9}), quantised)
    plan = PDPlan(model=checkpoint.shape("float32"), prefill=prefill, decode=decode, kv=kv)
    offsets = random_offsets(plan.model, [0, 3], size=0.5)  # whatever they are, both ends have them
    plan = plan.with_key_offsets(offsets.file)
    (folder / KEY_OFFSETS).write_bytes(offsets.data)
    engines = {}
    for stage in STAGES:
        data, changed = plan.model_dump(mode="json"), students[stage]
        more = {"replacements": changed, "missing": plan.missing(stage), "files": [folder / KEY_OFFSETS]}
        write_stage(checkpoint, folder / stage, plan.layers(stage), "float32", data, **more)
        build_target("onnx", folder / stage, folder / "engines" / stage)
        engines[stage] = Engine("onnxruntime", stage, folder / "engines" / stage)
    return folder, plan, engines


@pytest.mark.parametrize("stage", STAGES)
def test_onnxruntime_in_one_stage_only(tiny, stage, tmp_path):
    folder, plan, engines = tiny
    draw = random.Random(0)
    count, length = text_needed(plan)
    texts = [[draw.randrange(3, 259) for _ in range(length)] for _ in range(count)]
    page = 16 if stage == "prefill" else 1  # decode in torch on pages larger than a token, in one pool
    options = WorkerOptions(dtype="float32", page_size=page, chunked_prefill_size=64, threads=1)
    spec = ClusterSpec.on_loopback(folder / "prefill", folder / "decode", prefill=1, decode=1, options=options)
    workers = tuple(replace(w, engine=engines[stage] if w.role == stage else None) for w in spec.workers)
    with Cluster(replace(spec, workers=workers), ServeEnvironment.find(), tmp_path) as cluster:
        served = [(group, answer) for group in groups(plan, texts) for answer in ask(cluster.url, group, 6, 120)]
        (staged,) = sums(cluster.workers[0], "pdtrim_kv_staged_bytes_sum")
    models = (load_model(folder / name, "float32") for name in STAGES)
    result = judge(PDOracle(*models, plan, KeyOffsets.read(folder, plan)), served)
    assert result.max_logprob_error <= result.tolerance, result.rows
    assert result.controls_detected["dense plan"], result.controls
    assert result.controls_detected["an MLP more left out"], result.controls
    assert sum(row.cached_tokens > 190 for row in result.rows) >= 2, "prefix-cache hits were not tried"
    assert (staged > 0) == (stage == "prefill"), "only an engine of prefill packs in its graph"
    cut = "layers (3,) make K and V alone" in (tmp_path / "prefill-0.log").read_text()
    assert cut == (stage == "decode"), "only SGLang's own model is cut: an engine's graph is made so"
    logs = {name: (tmp_path / f"{name}-0.log").read_text() for name in STAGES}
    assert ("layers of blocks [] without attention, of [5] without MLP" in logs["prefill"]) == (stage == "decode")
    assert ("layers of blocks [5, 6] without attention, of [0] without MLP" in logs["decode"]) == (stage == "prefill")
