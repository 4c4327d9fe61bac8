"""The hooks take on the pinned SGLang; one that did not is named."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import transformers

from pdtrim_deploy.plan import Drop, Keep, KVOnly, KVSend, ModelShape, PDPlan
from pdtrim_deploy.plan.experts import BlockExperts, ExpertShape, KeptExperts

pytest.importorskip("sglang", reason="needs the serve environment")

SHAPE = ModelShape(architecture="X", fingerprint="f", num_blocks=1, num_kv_heads=1, head_dim=8, kv_dtype="float32")
SPARSE = PDPlan.dense(SHAPE).with_kv((KVSend(mode="sparse", n_first=1),))
POOL = SimpleNamespace(state_types=[], page_size=1)
PLAIN = {
    "pp_size": 1, "dcp_size": 1, "attn_cp_size": 1, "speculative_algorithm": None, "tokenizer_worker_num": 1,
    "quantization_param_path": None, "enable_custom_logit_processor": False,
    "enable_lora": None, "lora_paths": None, "json_model_override_args": "{}",
    "disaggregation_enable_kv_checksum": False, "hicache_storage_backend": None,
    "enable_unified_cache_external_linker": False,
}  # fmt: skip
DECODE = PLAIN | {
    "disaggregation_mode": "decode", "disaggregation_decode_enable_radix_cache": True,
    "disaggregation_decode_enable_offload_kvcache": False, "enable_streaming_session": False,
    "attention_backend": "torch_native", "decode_attention_backend": None, "enable_hierarchical_cache": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def registry():
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    load_plugins()
    return HookRegistry


def test_every_hook_takes(registry):
    from pdtrim_sglang import hook_targets

    hook_targets.check()


def test_a_hook_that_did_not_take_is_named(registry, monkeypatch):
    from pdtrim_sglang import hook_targets

    monkeypatch.setattr(registry, "_patched", registry._patched - {hook_targets.PRE_ALLOC})
    with pytest.raises(RuntimeError, match=r"did not take the hooks .*_pre_alloc; this plugin was written for SGLang"):
        hook_targets.check()


def test_every_transport_is_a_transfer_backend(registry):
    from pdtrim_sglang.manager import PDTrimKVManager
    from pdtrim_sglang.transports import TRANSPORTS
    from sglang.srt.disaggregation.utils import KVClassType, TransferBackend, get_kv_class

    for name in TRANSPORTS:
        backend = TransferBackend(f"pdtrim_{name}")
        assert get_kv_class(backend, KVClassType.MANAGER) is PDTrimKVManager


def test_backends_are_ours_where_a_layer_is_cut_and_only_there(registry, monkeypatch):
    from pdtrim_sglang import hook_targets
    from pdtrim_sglang.attention import kept_backend
    from pdtrim_sglang.attention.factory import ATTENTION, KeptFactory
    from pdtrim_sglang.kept_pool.pool import KeptKVPool
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    monkeypatch.setattr(kept_backend, "KeptBackend", lambda runner, make: ("ours", make(runner)))
    cut = object.__new__(KeptKVPool)
    for name in ATTENTION:
        assert isinstance(ATTENTION_BACKENDS[name], KeptFactory)
        factory = KeptFactory(name, lambda runner: "sglang's")
        runner = SimpleNamespace(token_to_kv_pool=cut, decode_attention_backend_str=name)
        assert factory(runner) == ("ours", "sglang's")
        assert factory(SimpleNamespace(token_to_kv_pool=None)) == "sglang's"
        runner.decode_attention_backend_str = "another"  # it is to be prefill's, which no request of decode runs
        assert factory(runner) == "sglang's"
    monkeypatch.setitem(ATTENTION_BACKENDS, "triton", ATTENTION_BACKENDS["triton"].original)
    with pytest.raises(RuntimeError, match=r"did not take the hooks ATTENTION_BACKENDS\[triton\];"):
        hook_targets.check()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"enable_hierarchical_cache": True}, "a row of every layer .* without --enable-hierarchical-cache"),
        ({"disaggregation_decode_enable_offload_kvcache": True}, "--disaggregation-decode-enable-offload-kvcache"),
        ({"enable_streaming_session": True}, "without --enable-streaming-session"),
        (
            {"attention_backend": "fa4"},
            "fa4 would read .* torch_native, triton, flashinfer, fa3, trtllm_mha:",
        ),
        ({"pp_size": 2}, "--pp-size 1"),
        ({"dcp_size": 2}, "--dcp-size 1"),
        ({"attn_cp_size": 2}, "--attn-cp-size 1"),
        ({"tokenizer_worker_num": 2}, "--tokenizer-worker-num 1"),
        ({"quantization_param_path": "scales.json"}, "--quantization-param-path"),
        ({"enable_custom_logit_processor": True}, "without --enable-custom-logit-processor"),
        ({"speculative_algorithm": "NGRAM"}, "cuts layers, .* start without --speculative-algorithm, or serve a plan"),
        ({"speculative_algorithm": "EAGLE3"}, "cuts layers, .* start without --speculative-algorithm"),
    ],
)
def test_options_that_would_give_wrong_text_are_refused(registry, options, sentence):
    from pdtrim_sglang.requirements import check_options

    check_options(SimpleNamespace(**DECODE), POOL, SPARSE, False)
    with pytest.raises(RuntimeError, match=sentence):
        check_options(SimpleNamespace(**DECODE | options), POOL, SPARSE, False)


@pytest.mark.parametrize("plan", [None, PDPlan.dense(SHAPE)])
@pytest.mark.parametrize("algorithm", ["NGRAM", "EAGLE", "EAGLE3", "NEXTN"])
@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_speculation_runs_where_no_layer_is_cut(registry, stage, algorithm, plan):
    from pdtrim_sglang.requirements import check_options

    options = DECODE | {"disaggregation_mode": stage, "speculative_algorithm": algorithm}
    check_options(SimpleNamespace(**options), POOL, plan, False)
    with pytest.raises(RuntimeError, match=r"verifies no drafted tokens: .* or without the engine"):
        check_options(SimpleNamespace(**options | ENGINE), POOL, plan, False)
    with pytest.raises(RuntimeError, match=r"by DFLASH is not supported; allowed: NGRAM, EAGLE, EAGLE3, NEXTN: start"):
        check_options(SimpleNamespace(**options | {"speculative_algorithm": "DFLASH"}), POOL, plan, False)


THREE = SHAPE.model_copy(update={"num_blocks": 3})
DENSE = PDPlan.dense(THREE)
ENGINE = {"json_model_override_args": '{"pdtrim_engine": {"executor": "onnxruntime", "path": "p", "stage": "decode"}}'}


def cut(prefill, decode=None):
    """`prefill` and `decode` name what each block's action is."""
    actions = {"keep": Keep(), "drop": Drop(), "kv_only": KVOnly()}
    stages = [tuple(actions[kind] for kind in stage.split()) for stage in (prefill, decode or prefill)]
    kept = sum(action.kind != "drop" for action in stages[1])
    return PDPlan(model=THREE, prefill=stages[0], decode=stages[1], kv=(KVSend(),) * kept)


@pytest.mark.parametrize("changes", [{"enable_lora": True}, {"lora_paths": ["a=b"]}])
@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (None, None),
        (DENSE, None),
        (DENSE.with_kv((KVSend(mode="sparse", n_first=1), KVSend(), KVSend(wire_dtype="int8"))), None),
        (
            cut("keep keep keep", "keep drop keep"),
            r"blocks of decode \(1\), so an adapter .*--enable-lora and --lora-paths",
        ),
        (cut("keep drop drop"), r"blocks of prefill \(1, 2\), so an adapter"),
        (cut("keep keep kv_only", "keep keep keep"), r"blocks of prefill \(2\), so an adapter"),
    ],
)
def test_adapters_of_the_unpruned_model_are_refused_where_layers_are_numbered_anew(changes, stage, plan, sentence):
    from pdtrim_sglang.requirements import check_options

    options = SimpleNamespace(**DECODE | changes | {"disaggregation_mode": stage})
    with pytest.raises(RuntimeError, match=sentence) if sentence else nullcontext():
        check_options(options, POOL, plan, False)
    vars(options).update(ENGINE)
    with pytest.raises(RuntimeError, match=sentence or "an engine's weights are its own"):
        check_options(options, POOL, plan, False)


@pytest.mark.parametrize(
    ("blocks", "changes", "refused"),
    [
        ("keep drop keep", {"enable_lora": True}, True),
        ("keep drop keep", {"lora_paths": ["a=b"]}, True),
        ("keep drop keep", {}, False),
        ("keep keep keep", {"enable_lora": True}, False),
        ("keep drop keep", {"enable_lora": True, "disaggregation_mode": "prefill"}, False),  # refused with its options
    ],
)
def test_adapters_of_the_unpruned_model_are_refused_of_one_model_for_both_stages(
    registry, tmp_path, blocks, changes, refused
):
    """Its worker has no KV manager, where a pair's options are checked."""
    from pdtrim_sglang import hook_targets
    from pdtrim_sglang.patches import loading

    plan = cut(blocks).with_parts(unified=True)
    (tmp_path / "config.json").write_text(json.dumps({"pdtrim": plan.model_dump(mode="json")}))
    runner = SimpleNamespace(
        server_args=SimpleNamespace(**PLAIN | {"disaggregation_mode": "null"} | changes),
        model_config=SimpleNamespace(model_path=str(tmp_path)),
    )
    with pytest.raises(RuntimeError, match=r"blocks of prefill \(1\), so an adapter") if refused else nullcontext():
        loading.check_adapters(None, runner)
    assert any(hook is loading.check_adapters for _, hook, _ in registry._hooks[hook_targets.LOADED])


@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("pruned", "modules", "refused"),
    [
        ({}, None, False),
        ({"decode": (0, 2)}, None, True),
        ({"prefill": (0, 2), "decode": (1, 2)}, {"all"}, True),
        ({"decode": (0, 2)}, ["q_proj", "down_proj"], True),
        ({"decode": (0, 2)}, ["q_proj", "v_proj"], False),
    ],
)
def test_adapters_of_the_unpruned_models_experts_are_refused_where_experts_are_numbered_anew(
    stage, pruned, modules, refused
):
    from pdtrim_sglang.requirements import check_options

    plan, shape = PDPlan.dense(SHAPE), ExpertShape(count=3, top_k=2)
    if pruned:
        kept = {name: (BlockExperts(block=0, kept=experts),) for name, experts in pruned.items()}
        plan = plan.with_parts(experts=KeptExperts(shape=shape, **kept))
    lora = {"enable_lora": True, "lora_target_modules": modules, "disaggregation_mode": stage}
    sentence = f"some experts of {' and '.join(pruned)} alone, so an adapter .* or some of these"
    with pytest.raises(RuntimeError, match=sentence) if refused else nullcontext():
        check_options(SimpleNamespace(**DECODE | lora), POOL, plan, False)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize(
    ("plan", "page_size", "refused"),
    [
        (None, 1, False),
        (None, 16, True),  # SGLang compares the rest of a last page, which is not sent
        (DENSE, 1, False),
        (DENSE, 16, True),
        (cut("keep drop keep"), 1, False),
        (cut("keep keep keep", "keep drop keep"), 1, True),
        (DENSE.with_kv((KVSend(), KVSend(mode="sparse", n_first=1), KVSend())), 1, True),
        (DENSE.with_kv((KVSend(), KVSend(), KVSend(wire_dtype="int8"))), 1, True),
    ],
)
def test_sglangs_own_digest_is_refused_where_both_pools_do_not_hold_the_same(stage, plan, page_size, refused):
    from pdtrim_sglang.requirements import check_options

    options = DECODE | {"disaggregation_mode": stage, "disaggregation_enable_kv_checksum": True}
    pool = SimpleNamespace(state_types=[], page_size=page_size)
    sentence = "start without --disaggregation-enable-kv-checksum"
    with pytest.raises(RuntimeError, match=sentence) if refused else nullcontext():
        check_options(SimpleNamespace(**options), pool, plan, False)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize("plan", [None, DENSE, SPARSE])
@pytest.mark.parametrize(
    "changes", [{"hicache_storage_backend": "file"}, {"enable_unified_cache_external_linker": True}]
)
def test_storage_whose_keys_are_the_same_for_both_stages_is_refused(changes, plan, stage):
    from pdtrim_sglang.requirements import check_options

    options = SimpleNamespace(**DECODE | changes | {"disaggregation_mode": stage})
    sentence = "start without --hicache-storage-backend and --enable-unified-cache-external-linker"
    with pytest.raises(RuntimeError, match=sentence) if plan else nullcontext():
        check_options(options, POOL, plan, False)


def test_sglangs_storage_finds_a_page_of_prefill_under_the_key_that_decode_asks_for(tmp_path, monkeypatch):
    """The reason of the refusal above, which can go when this fails: the model's name is all that keys know of it."""
    import torch
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(tmp_path))
    known = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1}
    known |= {"is_mla_model": False, "is_page_first_layout": False, "enable_storage_metrics": False}
    names = ("bundle", "bundle", "another")
    prefill, decode, another = (HiCacheFile(HiCacheStorageConfig(model_name=name, **known)) for name in names)
    prefill.set("hash of the tokens", torch.ones(8))
    assert decode.exists("hash of the tokens")
    assert not another.exists("hash of the tokens")


@pytest.mark.parametrize(
    ("heads", "ranks", "most"), [(4, 8, None), (4, 3, 1), (2, 4, None), (6, 4, 2), (4, 4, None), (8, 2, None)]
)
def test_ranks_that_can_neither_divide_the_kv_heads_nor_copy_them_are_refused_by_name(heads, ranks, most):
    import torch
    from pdtrim_sglang.plan_source import check_fits

    plan = PDPlan.dense(SHAPE.model_copy(update={"num_kv_heads": heads}))
    rows = [torch.zeros(2, max(1, heads // ranks), 8)]  # SGLang copies heads where there are too few
    pool = SimpleNamespace(k_buffer=rows, v_buffer=rows, dtype=torch.float32)
    sentence = f"{heads} KV heads can neither be divided among {ranks} ranks.*--tp-size {most}$"
    with pytest.raises(RuntimeError, match=sentence) if most else nullcontext():
        check_fits(plan, "decode", pool, ranks)


@pytest.mark.parametrize("side", ["k_buffer", "v_buffer"])
def test_a_later_layer_of_other_heads_than_the_plans_is_named(side):
    import torch
    from pdtrim_sglang.plan_source import check_fits

    plan = PDPlan.dense(SHAPE.model_copy(update={"num_blocks": 3}))
    rows = torch.zeros(2, SHAPE.num_kv_heads, SHAPE.head_dim)
    buffers = {name: [rows] * 3 for name in ("k_buffer", "v_buffer")}
    pool = SimpleNamespace(**buffers, dtype=getattr(torch, SHAPE.kv_dtype))
    check_fits(plan, "decode", pool, 1)
    buffers[side][-1] = rows[:, :1, :1]
    with pytest.raises(RuntimeError, match=r"the pool has \(1, 1\) in layer 2"):
        check_fits(plan, "decode", pool, 1)


@pytest.mark.parametrize(
    ("backend", "graph", "valid"),
    [
        ("triton", "full", None),
        ("triton", "breakable", "--cuda-graph-backend-decode full or disabled"),
        ("flashinfer", "full", None),
        ("fa3", "tc_piecewise", "--cuda-graph-backend-decode full or disabled"),
        ("torch_native", "breakable", None),
    ],
)
def test_graphs_that_would_replay_old_indices_are_refused(registry, monkeypatch, backend, graph, valid):
    import contextlib

    from pdtrim_sglang.requirements import check_options
    from sglang.srt.model_executor import cuda_graph_config

    monkeypatch.setattr(cuda_graph_config, "check_cuda_graph_backend", lambda phase, kind: kind == graph)
    with pytest.raises(RuntimeError, match=valid) if valid else contextlib.nullcontext():
        check_options(SimpleNamespace(**DECODE | {"attention_backend": backend}), POOL, SPARSE, False)


def test_a_registry_that_asks_for_no_signature_is_refused(monkeypatch):
    from pdtrim_sglang.requirements import check_options

    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(RuntimeError, match="unset SGLANG_RUST_SERVER"):
        check_options(SimpleNamespace(**PLAIN), POOL, None, False)


def test_first_tokens_on_the_gpu_are_refused_where_sglang_would_keep_them_there(registry, monkeypatch):
    """Its metadata buffers, whose addresses the plugin reads as host memory."""
    import torch
    from pdtrim_sglang.requirements import check_options
    from sglang.srt.disaggregation.utils import MetadataBuffers

    devices, zeros = set(), torch.zeros

    def noted(*size, device, **options):
        devices.add(device)
        return zeros(*size, **options)

    monkeypatch.setattr(torch, "zeros", noted)
    for pool, keeps in ((None, "cpu"), ("NVLINK", "cpu"), ("INTRA_NODE_NVLINK", "cuda")):
        if pool is not None:
            monkeypatch.setenv("SGLANG_MOONCAKE_CUSTOM_MEM_POOL", pool)
        devices.clear()
        MetadataBuffers(2, 8, torch.float32, max_sampling_mask_tokens=0)
        assert devices == {keeps}
        if keeps == "cpu":
            check_options(SimpleNamespace(**PLAIN), POOL, None, False)
    with pytest.raises(RuntimeError, match=r"keeps first tokens on the GPU, .*: unset it"):
        check_options(SimpleNamespace(**PLAIN), POOL, None, False)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_staging_buffer_without_room_for_a_page_is_refused(registry, monkeypatch, stage):
    """Chunks are whole pages; packing one there would write behind the buffer."""
    import torch
    from pdtrim_sglang import manager
    from pdtrim_sglang.pool import PoolView
    from sglang.srt.disaggregation.utils import DisaggregationMode

    shape = SHAPE.model_copy(update={"num_kv_heads": 4, "head_dim": 128})
    view = PoolView([torch.zeros(1, 2, 128)], [torch.zeros(1, 2, 128)], 64)  # of one rank of two
    monkeypatch.setattr(manager, "check_fits", lambda *_: None)
    monkeypatch.setattr(manager.PoolView, "of", lambda pool: view)
    monkeypatch.setattr(manager.PDTrimKVManager, "_start_heartbeat_checker_thread", lambda self: None)
    for side in ("PrefillSide", "DecodeSide"):
        monkeypatch.setattr(manager, side, lambda *_: "made")
    worker = object.__new__(manager.PDTrimKVManager)
    worker._given_plan, worker._secret = PDPlan.dense(shape), b""
    worker.attn_tp_size, worker.attn_tp_rank = 2, 1
    worker.attn_dp_rank = worker.system_dp_rank = 0
    worker.disaggregation_mode = DisaggregationMode(stage)
    worker.kv_args = SimpleNamespace(aux_data_ptrs=(), aux_item_lens=())
    worker.server_args = SimpleNamespace(disaggregation_transfer_backend="pdtrim_tcp", context_length=None)
    model = SimpleNamespace(config=transformers.LlamaConfig(num_key_value_heads=4))
    page = 64 * 2 * 2 * 128 * 4  # tokens, K and V, heads, values, bytes
    override = '{"pdtrim_transport": {"staging_bytes": %d}}'
    worker.server_args.json_model_override_args = override % page
    worker.attach(None, model)
    worker.server_args.json_model_override_args = override % (page - 1)
    with pytest.raises(RuntimeError, match=f"staging_bytes {page - 1} hold no page of 64 tokens .*{page}"):
        worker.attach(None, model)


@pytest.mark.parametrize(
    ("planned", "ranks", "rank", "held"),
    [(True, 2, 1, range(2, 4)), (True, 8, 5, range(2, 3)), (False, 4, 3, range(3, 4)), (False, 8, 6, range(3, 4))],
)
@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_rank_knows_which_heads_of_the_model_its_pool_holds(monkeypatch, stage, planned, ranks, rank, held):
    """Without a plan too: every rank of either stage then serves the same one, of the model's heads."""
    import torch
    from pdtrim_sglang import manager
    from pdtrim_sglang.pool import PoolView
    from sglang.srt.disaggregation.utils import DisaggregationMode

    sides = []
    rows = [torch.zeros(64, len(held), 8)]
    monkeypatch.setattr(manager.PoolView, "of", lambda pool: PoolView(rows, rows, 1))
    monkeypatch.setattr(manager.PDTrimKVManager, "_start_heartbeat_checker_thread", lambda self: None)
    for name in ("PrefillSide", "DecodeSide"):
        monkeypatch.setattr(manager, name, lambda *side: sides.append(side))
    worker = object.__new__(manager.PDTrimKVManager)
    shape = SHAPE.model_copy(update={"num_kv_heads": 4})
    worker._given_plan, worker._secret = PDPlan.dense(shape) if planned else None, b""
    worker.attn_tp_size, worker.attn_tp_rank = ranks, rank
    worker.attn_dp_rank = worker.system_dp_rank = 0
    worker.disaggregation_mode = DisaggregationMode(stage)
    worker.kv_args = SimpleNamespace(aux_data_ptrs=(), aux_item_lens=(), ib_device="mlx5_3", gpu_id=0)
    worker.server_args = SimpleNamespace(
        disaggregation_transfer_backend="pdtrim_tcp", context_length=None, json_model_override_args="{}"
    )
    pool = SimpleNamespace(k_buffer=rows, v_buffer=rows, dtype=torch.float32)
    config = transformers.LlamaConfig(num_key_value_heads=4, num_attention_heads=8)
    worker.attach(pool, SimpleNamespace(config=config))
    ((_, plan, view, *_, transport),) = sides
    assert (transport.devices, transport.protocol) == ("mlx5_3", "rdma")  # SGLang's --disaggregation-ib-device
    if planned:
        config.num_key_value_heads = 8  # as SGLang does on a CPU for 8 ranks, with heads of zeros behind the four
        with pytest.raises(RuntimeError, match="SGLang pads this model's 4 KV heads to 8 here"):
            worker.attach(pool, SimpleNamespace(config=config))
    assert view.heads == held
    assert plan.model.num_kv_heads == 4


@pytest.mark.parametrize(
    ("config", "length", "refused"),
    [
        (transformers.MistralConfig(sliding_window=4096, max_position_embeddings=32768), None, True),
        (transformers.MistralConfig(sliding_window=4096, max_position_embeddings=32768), 4097, True),
        (transformers.MistralConfig(sliding_window=4096, max_position_embeddings=32768), 4096, False),
        (transformers.MistralConfig(sliding_window=None, max_position_embeddings=32768), None, False),
        (transformers.Qwen2Config(use_sliding_window=False, sliding_window=4096), None, False),
        (transformers.Qwen2Config(use_sliding_window=True, sliding_window=4096, max_window_layers=0), None, True),
        (transformers.LlamaConfig(), None, False),
    ],
)
def test_texts_longer_than_a_sliding_window_are_refused(config, length, refused):
    from pdtrim_sglang.requirements import check_window

    with pytest.raises(RuntimeError, match="--context-length 4096") if refused else nullcontext():
        check_window(config, length)


@pytest.mark.parametrize(
    ("overlap", "device", "waits"), [(True, "cuda", True), (True, "cpu", False), (False, "cuda", False)]
)
def test_a_forward_pass_that_may_still_write_is_noted(registry, overlap, device, waits):
    from pdtrim_sglang.patches import transfer

    stream = SimpleNamespace(record_event=lambda: "event")
    queue = SimpleNamespace(scheduler=SimpleNamespace(enable_overlap=overlap, device=device, forward_stream=stream))
    waiting = SimpleNamespace(
        kv_receiver=SimpleNamespace(),
        req=SimpleNamespace(output_ids=[], origin_input_ids=[1, 2, 3], kv=SimpleNamespace(req_pool_idx=9)),
    )
    seen = []
    transfer.name_prompt_of_receiver(lambda _, req: seen.append(vars(req.kv_receiver).copy()), queue, waiting)
    assert seen == [{"prompt_tokens": 3, "row": 9, "forward_done": "event" if waits else None}]


def test_a_stock_checkpoint_with_another_kv_dtype_is_refused():
    import torch
    from pdtrim_sglang.plan_source import dense_plan

    pool = SimpleNamespace(k_buffer=[torch.zeros(2, 1, 8)], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"cannot send a KV cache of torch.float64: .*--kv-cache-dtype auto, fp8_e4"):
        dense_plan(1, pool, 1)
    fp8 = dense_plan(1, SimpleNamespace(k_buffer=pool.k_buffer, dtype=torch.float8_e5m2), 1).model
    assert (fp8.pool_dtype, fp8.row_dtype) == ("fp8_e5m2", "float8_e5m2")


def test_what_prefill_computed_anew_stays_prompt_when_the_request_is_retracted_again():
    """Of the tokens emitted before, sparse layers were sent the last rows only."""
    from pdtrim_sglang.patches import memory

    req = SimpleNamespace(origin_input_ids=[1] * 5, output_ids=[2] * 7)
    req.pd_rebootstrap_in_progress, req.kv = True, SimpleNamespace(req_pool_idx=1, kv_committed_len=12)
    admitted = []
    pool = SimpleNamespace(kept=SimpleNamespace(admit=lambda *request: admitted.append(request)))
    queue = SimpleNamespace(token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool))
    memory.admit(lambda *_: None, queue, req)
    req.pd_rebootstrap_in_progress, req.output_ids = False, [2] * 20  # and back from its backup
    req.kv.kv_committed_len = 24
    memory.admit(lambda *_: None, queue, req)
    assert admitted == [(1, 12, 12), (1, 12, 24)]
