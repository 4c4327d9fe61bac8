"""Sublayers that a plan leaves out of SGLang's own models: gone before the pool is sized, attentions numbered anew."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("sglang", reason="needs the serve environment")
from pdtrim_sglang import hook_targets
from pdtrim_sglang.kv_only import WriteKV
from pdtrim_sglang.patches import loading
from pdtrim_sglang.sublayers import ZeroAttention, ZeroMLP, cut_attention, cut_mlp
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.model_executor.model_runner_components.layer_setup import ModelLayerInfo
from sglang.srt.plugins.hook_registry import HookRegistry

from pdtrim_deploy.plan import Keep, KVOnly, KVSend, LinearStates, ModelShape, PDPlan, WithoutAttention, WithoutMLP

HIDDEN = 24
SHAPE = ModelShape(architecture="X", fingerprint="f", num_blocks=5, num_kv_heads=2, head_dim=4, kv_dtype="float32")
PLAN = PDPlan(
    model=SHAPE,
    prefill=(Keep(), WithoutAttention(), WithoutMLP(), KVOnly(), Keep()),
    decode=(WithoutAttention(), WithoutAttention(), Keep(), WithoutMLP(), Keep()),
    kv=(KVSend(),) * 3,
)


ROTARY = nn.Module()  # one for all layers, as SGLang's get_rope gives it
ROTARY.register_buffer("cos_sin_cache", torch.ones(8, 4))


class Layer(nn.Module):
    """As SGLang's decoder layers; `experts` as Mixtral's."""

    def __init__(self, index, experts=False):
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj, self.self_attn.o_proj = nn.Linear(HIDDEN, 32), nn.Linear(16, HIDDEN)
        self.self_attn.rotary_emb = ROTARY
        self.self_attn.attn = nn.Identity()
        self.self_attn.attn.layer_id = index
        mlp = nn.Linear(HIDDEN, HIDDEN)
        setattr(self, "block_sparse_moe" if experts else "mlp", mlp)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(HIDDEN), RMSNorm(HIDDEN)
        self.input_layernorm.fuse_input_quant(self.self_attn.qkv_proj)
        self.post_attention_layernorm.fuse_input_quant(mlp)
        mlp.weight.weight_loader = mlp.forward


@pytest.fixture
def runner(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"pdtrim": PLAN.model_dump(mode="json")}))
    return SimpleNamespace(
        model=SimpleNamespace(
            model=SimpleNamespace(layers=nn.ModuleList(map(Layer, range(5)))),
            config=SimpleNamespace(hidden_size=HIDDEN),
        ),
        startup_weight_load=None,
        is_draft_worker=False,
        server_args=SimpleNamespace(disaggregation_mode="decode", pp_size=1),
        model_config=SimpleNamespace(model_path=str(tmp_path)),
        layer_info=ModelLayerInfo(start_layer=0, end_layer=5, num_effective_layers=5),
    )


def after_loading(runner):
    loading.cut_planned_layers(None, runner)
    loading.count_kv_layers(None, runner)
    layers = runner.model.model.layers
    return (
        [layer.self_attn.attn.layer_id for layer in layers if not isinstance(layer.self_attn, ZeroAttention)],
        [isinstance(layer.self_attn, ZeroAttention) for layer in layers],
        [isinstance(layer.mlp, ZeroMLP) for layer in layers],
        runner.layer_info.num_effective_layers,
    )


def test_decode_has_a_pool_of_the_attentions_that_are_left(runner):
    numbers, attentions, mlps, layers = after_loading(runner)
    assert numbers == [0, 1, 2]
    assert attentions == [True, True, False, False, False]
    assert mlps == [False, False, False, True, False]
    assert (layers, runner.layer_info.end_layer) == (3, 3)


def test_a_layer_for_its_kv_alone_writes_to_its_new_number(runner):
    runner.server_args.disaggregation_mode = "prefill"
    numbers, attentions, mlps, layers = after_loading(runner)
    assert numbers == [0, 1, 2, 3]
    assert attentions == [False, True, False, False, False]
    assert mlps == [False, False, True, True, False]
    assert layers == 4
    write = runner.model.model.layers[3].self_attn.attn
    assert isinstance(write, WriteKV)
    assert (write.layer_id, write.attention.layer_id) == (2, 2)


def test_a_worker_of_one_model_is_cut_without_disaggregation(runner, tmp_path):
    config = json.loads((tmp_path / "config.json").read_text())
    plan = PDPlan.parse(config["pdtrim"], "config.json")
    whole = PDPlan.uncut(plan.model, plan.decode, plan.decode).with_parts(unified=True)
    (tmp_path / "config.json").write_text(json.dumps(config | {"pdtrim": whole.model_dump(mode="json")}))
    decode = ([0, 1, 2], [True, True, False, False, False], [False, False, False, True, False], 3)
    runner.server_args.disaggregation_mode = "null"
    assert after_loading(runner) == decode


@pytest.mark.parametrize(
    "change",
    [
        lambda runner: setattr(runner.server_args, "disaggregation_mode", "null"),
        lambda runner: setattr(runner.server_args, "pp_size", 2),
        lambda runner: setattr(runner, "is_draft_worker", True),
    ],
    ids=["no disaggregation", "a part of a model", "a draft model"],
)
def test_no_other_worker_is_cut(change, runner):
    change(runner)
    assert after_loading(runner) == ([0, 1, 2, 3, 4], [False] * 5, [False] * 5, 5)


def test_weights_that_come_later_are_refused(runner):
    runner.startup_weight_load = "under way"
    with pytest.raises(RuntimeError, match="start decode without --startup-weight-load-mode overlap"):
        loading.cut_planned_layers(None, runner)


def test_modules_that_are_not_sglangs_own_are_refused(runner):
    del runner.model.model.layers[4].self_attn.attn
    with pytest.raises(RuntimeError, match="SGLang runs SimpleNamespace by modules that the plugin does not cut"):
        loading.cut_planned_layers(None, runner)


def test_an_engines_stage_has_a_pool_of_kv_layers_too(runner):
    runner.model = SimpleNamespace()
    loading.cut_planned_layers(None, runner)
    loading.count_kv_layers(None, runner)
    assert runner.layer_info.num_effective_layers == 3


def test_beside_linear_attention_sglang_counts_kv_layers_itself(runner, tmp_path):
    """Among all layers: of fewer it would find no layer with KV, and make none a pool."""
    states = LinearStates(blocks=(0, 1, 2, 4), key_heads=1, key_dim=2, value_heads=1, value_dim=2, conv_columns=3)
    plan = PDPlan.dense(SHAPE.model_copy(update={"states": states}))
    (tmp_path / "config.json").write_text(json.dumps({"pdtrim": plan.model_dump(mode="json")}))
    loading.count_kv_layers(None, runner)
    assert (runner.layer_info.num_effective_layers, runner.layer_info.end_layer) == (5, 5)


@pytest.mark.parametrize("experts", [False, True])
def test_what_is_cut_adds_nothing_and_is_freed_at_once(experts):
    layer = Layer(0, experts)
    held = [parameter for name, parameter in layer.named_parameters() if "norm" not in name]
    nbytes = sum(parameter.nbytes for parameter in held)
    assert nbytes > 5000
    assert cut_attention(layer) + cut_mlp(layer) == nbytes
    assert sum(parameter.untyped_storage().nbytes() for parameter in held) == 0
    assert ROTARY.cos_sin_cache.numel() == 32, "other layers still rotate by it"
    x = torch.randn(5, HIDDEN)
    attended = layer.self_attn(positions=None, hidden_states=x, forward_batch=None)
    mlp = layer.block_sparse_moe if experts else layer.mlp
    assert torch.equal(attended, torch.zeros(5, HIDDEN))
    assert torch.equal(mlp(x, forward_batch=None), torch.zeros(5, HIDDEN))
    assert layer.input_layernorm._quant_linear is layer.post_attention_layernorm._quant_linear is None


def test_sglang_is_hooked_between_its_layers_and_its_pool():
    from sglang.srt.plugins import load_plugins

    load_plugins()
    taken, _, _ = HookRegistry._hooks[hook_targets.LOADED]
    assert taken[1] is loading.count_kv_layers
    assert hook_targets.LOADED in hook_targets.TARGETS
