"""KV-only layers in SGLang's own models: cut before any graph is captured, freed, and still written to the pool."""

import ast
import gc
import importlib.util
import json
import weakref
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang import hook_targets
from pdtrim_sglang.kv_only import WriteKV, keep_only_kv
from pdtrim_sglang.patches import loading
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor import forward_context
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import breakable_cuda_graph
from sglang.srt.model_executor.runner_utils.forward_batch import set_forward_batch
from sglang.srt.model_executor.runner_utils.prefill_graph import prefill_graph_scope
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from pdtrim_deploy.plan import Keep, KVOnly, KVSend, ModelShape, PDPlan

HIDDEN, HEADS, DIM = 24, 2, 4
SHAPE = ModelShape(
    architecture="X", fingerprint="f", num_blocks=3, num_kv_heads=HEADS, head_dim=DIM, kv_dtype="float32"
)
PLAN = PDPlan(model=SHAPE, prefill=(Keep(), KVOnly(), Keep()), decode=(Keep(),) * 3, kv=(KVSend(),) * 3)


class Pool:
    def __init__(self):
        self.written = []

    def get_key_buffer(self, layer_id):
        pass

    def set_kv_buffer(self, attention, loc, k, v):
        self.written.append((attention.layer_id, loc.tolist(), k.clone(), v.clone()))


def attention(index=1):
    module = nn.Identity()
    module.tp_k_head_num, module.head_dim, module.layer_id = HEADS, DIM, index
    return module


class Layer(nn.Module):
    """As SGLang's decoder layers: a parameter knows its module, and the norm before the MLP knows its projection."""

    def __init__(self, index):
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.attn, self.self_attn.o_proj = attention(index), nn.Linear(16, HIDDEN)
        self.mlp.up, self.mlp.down = nn.Linear(HIDDEN, 40), nn.Linear(40, HIDDEN)
        self.post_attention_layernorm = RMSNorm(HIDDEN)
        self.post_attention_layernorm.fuse_input_quant(self.mlp.up)
        for module in (self.self_attn.o_proj, self.mlp.up, self.mlp.down):
            module.weight.weight_loader = module.forward


def model():
    return SimpleNamespace(
        model=SimpleNamespace(layers=nn.ModuleList(map(Layer, range(3)))), config=SimpleNamespace(hidden_size=HIDDEN)
    )


def batch(tokens, real=None, slots=0, mode=ForwardMode.EXTEND):
    return SimpleNamespace(
        forward_mode=mode, out_cache_loc=slots + torch.arange(tokens), global_num_token_non_padded_cpu=real,
        positions=None, mha_return_lse=False, _attn_output=None,
    )  # fmt: skip


def rows(tokens):
    return torch.randn(tokens, 16), torch.randn(tokens, HEADS * DIM), torch.randn(tokens, HEADS * DIM)


def running(pool, forward=None):
    """SGLang's forward context, as of a backend with this pool."""
    backend = SimpleNamespace(token_to_kv_pool=pool, forward=forward)
    return forward_context.forward_context(forward_context.ForwardContext(attn_backend=backend))


@pytest.fixture
def runner(tmp_path):
    """What the hook sees of SGLang's ModelRunner, before its model is loaded."""
    (tmp_path / "config.json").write_text(json.dumps({"pdtrim": PLAN.model_dump(mode="json")}))

    class Runner:
        startup_weight_load = None
        server_args = SimpleNamespace(disaggregation_mode="prefill", pp_size=1)
        model_config = SimpleNamespace(model_path=str(tmp_path))

        def load_model(self):
            self.model = model()

    from sglang.srt.plugins import load_plugins

    load_plugins()
    taken = [(kind, hook) for kind, hook, _ in HookRegistry._hooks[hook_targets.LOAD_MODEL]]
    assert [kind for kind, _ in taken] == [HookType.AFTER]
    load, (_, hook) = Runner.load_model, taken[0]
    Runner.load_model = lambda self: hook(load(self), self)
    return Runner()


def cut(runner):
    return [isinstance(layer.self_attn.attn, WriteKV) for layer in runner.model.model.layers]


def test_the_planned_layers_are_cut_when_the_model_is_loaded(runner):
    runner.load_model()
    assert cut(runner) == [False, True, False]


@pytest.mark.parametrize("other", ["decode", "null"])  # "null": no disaggregation
def test_no_other_worker_is_cut(runner, other):
    runner.server_args.disaggregation_mode = other
    runner.load_model()
    assert not any(cut(runner))


def test_what_will_be_refused_by_name_is_left_alone(runner):
    """A model of another length, and a part of one."""
    runner.model = model()
    runner.server_args.pp_size = 2
    loading.cut_planned_layers(None, runner)
    assert not any(cut(runner))
    runner.server_args.pp_size = 1
    del runner.model.model.layers[2]
    loading.cut_planned_layers(None, runner)
    assert not any(cut(runner))


def test_weights_that_come_later_are_refused(runner):
    runner.startup_weight_load = "under way"
    with pytest.raises(RuntimeError, match="start prefill without --startup-weight-load-mode overlap"):
        runner.load_model()


def test_what_a_graph_was_captured_with_is_there_as_long_as_the_model(runner, monkeypatch):
    """A start-up in SGLang's order; the "graph" knows of the parameters what a captured one does: where they are."""
    from pdtrim_sglang import manager
    from sglang.srt.disaggregation.utils import DisaggregationMode

    runner.load_model()
    captured = [weakref.ref(parameter) for layer in runner.model.model.layers for parameter in layer.parameters()]
    places = [reference().data_ptr() for reference in captured]
    worker = object.__new__(manager.PDTrimKVManager)
    worker._given_plan, worker._secret, worker.attn_tp_size, worker.attn_tp_rank = PLAN, b"", 1, 0
    worker.attn_dp_rank = worker.system_dp_rank = 0
    worker.disaggregation_mode = DisaggregationMode.PREFILL
    worker.kv_args = SimpleNamespace(aux_data_ptrs=(), aux_item_lens=())
    worker.server_args = SimpleNamespace(
        disaggregation_transfer_backend="pdtrim_tcp", context_length=None, json_model_override_args=""
    )
    view = manager.PoolView([torch.zeros(1, 1, 4)] * 3, [torch.zeros(1, 1, 4)] * 3, 1)
    monkeypatch.setattr(manager.PoolView, "of", lambda pool: view)
    monkeypatch.setattr(manager, "PrefillSide", lambda *_: "made")
    for check in ("check_fits", "check_window", "check_staging"):
        monkeypatch.setattr(manager, check, lambda *_: None)
    worker.attach(Pool(), runner.model)
    gc.collect()
    assert len(captured) > 10
    assert [reference() is not None and reference().data_ptr() for reference in captured] == places


def test_sglang_loads_the_model_before_it_captures_a_graph_and_makes_the_manager_last():
    assert in_order("managers/scheduler.py", "Scheduler", "__init__", ["init_model_worker", "init_disaggregation"])
    assert in_order(
        "managers/scheduler.py", "Scheduler", "init_model_worker", ["init_tp_model_worker", "init_all_cuda_graphs"]
    )
    assert in_order("managers/scheduler.py", "Scheduler", "init_tp_model_worker", ["TpModelWorker"])
    assert in_order("managers/tp_worker.py", "TpModelWorker", "__init__", ["_init_model_runner"])
    assert in_order("managers/tp_worker.py", "TpModelWorker", "_init_model_runner", ["ModelRunner"])
    assert in_order("model_executor/model_runner.py", "ModelRunner", "__init__", ["initialize"])
    assert in_order("model_executor/model_runner.py", "ModelRunner", "initialize", ["load_model"])


def in_order(file, owner, method, calls):
    """Whether `owner.method` of SGLang calls each of `calls` for the first time in this order."""
    root = Path(importlib.util.find_spec("sglang").submodule_search_locations[0]) / "srt"
    (definition,) = (
        member
        for node in ast.parse((root / file).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == owner
        for member in node.body
        if isinstance(member, ast.FunctionDef) and member.name == method
    )
    lines = {}
    for node in ast.walk(definition):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            lines[name] = min(node.lineno, lines.get(name, node.lineno))
    return all(name in lines for name in calls) and sorted(calls, key=lines.get) == calls


def test_a_cut_layer_writes_its_rows_and_adds_nothing():
    layer, pool = Layer(1), Pool()
    keep_only_kv(layer, HIDDEN)
    q, k, v = rows(5)
    with running(pool):
        out, bias = layer.self_attn.o_proj(layer.self_attn.attn(q, k, v, batch(5, slots=7)))
    assert bias is None
    assert torch.equal(out, torch.zeros(5, HIDDEN))
    x = torch.randn(5, HIDDEN)
    assert torch.equal(layer.mlp(x, forward_batch=None), torch.zeros(5, HIDDEN))
    ((index, slots, keys, values),) = pool.written
    assert (index, slots) == (1, [7, 8, 9, 10, 11])
    assert torch.equal(keys, k.view(5, HEADS, DIM))
    assert torch.equal(values, v.view(5, HEADS, DIM))
    with running(pool):
        layer.self_attn.attn(q, None, None, batch(5), save_kv_cache=False)
    assert len(pool.written) == 1


def test_the_weights_of_a_cut_layer_are_freed_at_once():
    layer = Layer(1)
    held = list(layer.self_attn.o_proj.parameters()) + list(layer.mlp.parameters())
    nbytes = sum(parameter.nbytes for parameter in held)
    assert nbytes > 8000
    assert keep_only_kv(layer, HIDDEN) == nbytes
    assert sum(parameter.untyped_storage().nbytes() for parameter in held) == 0
    assert layer.post_attention_layernorm._quant_linear is None


def test_a_projection_with_transposed_weights_gives_hidden_values():
    """As SGLang's fp8 linear layers store them."""
    layer = Layer(1)
    layer.self_attn.o_proj.weight.data = layer.self_attn.o_proj.weight.data.t()
    keep_only_kv(layer, HIDDEN)
    assert layer.self_attn.o_proj(torch.randn(3, 16))[0].shape == (3, HIDDEN)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize(
    ("mode", "real"), [("EXTEND", None), ("EXTEND", 3), ("EXTEND", 5), ("EXTEND", 0), ("DECODE", 3)]
)
def test_the_rows_written_are_those_that_sglangs_attention_hands_its_backend(graph, mode, real, monkeypatch):
    """Rows of padding are not: their slots are another request's, or none."""
    monkeypatch.setattr("sglang.srt.layers.cp.padding.attention_query_tokens", lambda _, tokens: tokens)
    monkeypatch.setattr("sglang.srt.layers.cp.padding.attention_output_tokens", lambda _, tokens: tokens)
    monkeypatch.setattr("sglang.srt.layers.radix_attention.is_in_breakable_cuda_graph", lambda: graph)
    genuine, pool = RadixAttention(4, DIM, 1.0, HEADS, 1), Pool()

    def forward(q, k, v, layer, forward_batch, save_kv_cache=True, **_):
        pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k.view(-1, HEADS, DIM), v.view(-1, HEADS, DIM))
        return q

    inputs, seen = rows(5), batch(5, real, mode=ForwardMode[mode])
    written = []
    for attends in (genuine, WriteKV(genuine)):
        pool = Pool()
        with ExitStack() as scopes:
            scopes.enter_context(running(pool, forward))
            if graph:
                scopes.enter_context(set_forward_batch(seen))
                scopes.enter_context(prefill_graph_scope(full_graph=False))
            attends(*inputs, seen)
        written.append([(slots, keys.tolist(), values.tolist()) for _, slots, keys, values in pool.written])
    assert written[0] == written[1]


def test_a_replayed_graph_writes_the_rows_of_its_own_batch():
    """Genuine `eager_on_graph`, with a capture that knows no GPU: what it recorded runs again, for another batch."""
    pool, later, layer = Pool(), Pool(), WriteKV(attention())
    q, k, v = rows(8)
    segments = []
    capture = SimpleNamespace(
        cuda_graph=breakable_cuda_graph.BreakableCUDAGraph(),
        _barrier_fn=None,
        _end_current_segment=lambda: segments.append("end"),
        _begin_new_segment=lambda: segments.append("begin"),
    )
    with ExitStack() as scopes:
        scopes.enter_context(running(pool))
        scopes.enter_context(prefill_graph_scope(full_graph=False))
        scopes.enter_context(set_forward_batch(batch(8, 8)))
        token = breakable_cuda_graph._current_capture_var.set(capture)
        layer(q, k, v, batch(8, 8))
        breakable_cuda_graph._current_capture_var.reset(token)
    assert segments == ["end", "begin"]
    (replayed,) = capture.cuda_graph._break_fns
    k.copy_(torch.randn_like(k))  # the graph computes into the same memory
    with running(later), set_forward_batch(batch(8, 5, slots=100)):
        replayed()
    assert len(pool.written) == 1
    ((_, slots, keys, _),) = later.written
    assert slots == [100, 101, 102, 103, 104]
    assert torch.equal(keys, k[:5].view(5, HEADS, DIM))


@pytest.mark.parametrize("real", [None, 3, 0])
def test_a_cut_layer_waits_for_the_prefix_that_hicache_loads(real):
    """Genuine pool: no attention of this layer would wait, and the transfer reads the rows after the forward pass."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    shape = {"dtype": torch.float32, "head_num": HEADS, "head_dim": DIM, "layer_num": 3, "device": "cpu"}
    pool, waited = MHATokenToKVPool(16, page_size=1, enable_memory_saver=False, **shape), []
    pool.register_layer_transfer_counter(SimpleNamespace(wait_until=waited.append))
    with running(pool):
        WriteKV(attention(2))(*rows(5), batch(5, real))
    assert waited == [2]
