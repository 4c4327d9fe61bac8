"""The stage graph of every family against transformers, and what it refuses."""

import json
import os
import shutil

import onnx
import pytest
import torch
from pdtrim_builders import build_target
from pdtrim_builders.graph import ops
from pdtrim_builders.graph.build import build_graph
from pdtrim_builders.graph.rope import KINDS, rope_settings, rope_table
from pdtrim_builders.graph.stage import read_stage
from pdtrim_builders.graph.weights import weight_bytes
from pdtrim_builders.numerics import check_numerics
from pdtrim_builders.prompts import PROMPTS
from pdtrim_builders.runtime_onnx import OnnxStage
from tinyfamilies import taking

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.job import run_job
from pdtrim_deploy.models import FAMILIES
from pdtrim_deploy.pipeline.engines import BUILDER


@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize("architecture", taking("engines"))
def test_family(architecture, stage, tiny_stages, tmp_path, record_property):
    result = build_target("onnx", tiny_stages(architecture) / stage, tmp_path / "engine")
    layers, sends = (5, 4) if stage == "prefill" else (4, 0)
    assert (result.ops["PagedAttention"], result.ops["SparseKVSend"]) == (layers, sends)
    assert result.numerics.hidden_error < 2e-5  # the gate itself allows more
    assert (result.numerics.kv_error is None) == (stage == "decode")
    assert json.loads((tmp_path / "engine" / "engine.json").read_text())["numerics"]["tokens"] > 600
    record_property("family", (architecture, "engine", "onnx"))


@pytest.mark.parametrize("architecture", taking("engines"))
def test_a_layer_for_its_kv_alone(architecture, tiny_dir, make_stages, tmp_path):
    """The checkpoint has zeros where the graph has nothing; both say the same."""
    make_stages(tiny_dir(architecture), tmp_path, alone=4)
    result = build_target("onnx", tmp_path / "prefill", tmp_path / "engine")
    assert [result.ops[op] for op in ops.OPS] == [4, 1, 4]
    assert result.ops["MatMul"] == 4 * 4 + 1  # one more, of K and V
    assert max(result.numerics.hidden_error, result.numerics.kv_error) < 2e-5
    weights = {weight.name for weight in onnx.load(tmp_path / "engine" / "model.onnx").graph.initializer}
    assert {name for name in weights if name.startswith("l3.")} <= {"l3.kv.weight", "l3.kv.bias"}
    assert not any("layers.3.post" in name or "layers.3.self_attn.q" in name for name in weights)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize("architecture", taking("engines"))
def test_sublayers_that_the_plan_leaves_out_are_not_in_the_graph(architecture, stage, half_stages, tmp_path):
    """The checkpoint has zeros where the graph has nothing; both say the same, on the wire too."""
    result = build_target("onnx", half_stages(architecture) / stage, tmp_path / "engine")
    attentions, sends = (4, 3) if stage == "prefill" else (3, 0)
    assert [result.ops[op] for op in ops.OPS] == [attentions, 0, sends]
    assert result.ops["MatMul"] == 2 * attentions + 2 * 4  # qkv and o; gate with up, and down
    assert max(result.numerics.hidden_error, result.numerics.kv_error or 0) < 2e-5
    graph = onnx.load(tmp_path / "engine" / "model.onnx").graph
    layer_ids = [
        {a.name: a.i for a in node.attribute}["layer_id"] for node in graph.node if node.op_type == "PagedAttention"
    ]
    assert layer_ids == list(range(attentions))  # of the pool, which has no layer without attention


@pytest.mark.parametrize("architecture", [*sorted(set(FAMILIES) - set(taking("engines"))), "ArceeForCausalLM"])
def test_a_family_without_a_graph_is_refused_with_the_reason(
    architecture, tiny_dir, make_stages, tmp_path, record_property
):
    make_stages(tiny_dir(architecture), tmp_path)
    with pytest.raises(UserError, match=f"{architecture} has no engine: .*; serve it by SGLang's own model"):
        build_target("onnx", tmp_path / "prefill", tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
    record_property("family", (architecture, "engine", "refused"))


def test_interface(tiny_stages, tmp_path):
    build_target("onnx", tiny_stages("LlamaForCausalLM") / "prefill", tmp_path / "engine")
    model = onnx.load(tmp_path / "engine" / "model.onnx")
    assert [i.name for i in model.graph.input] == [
        "input_ids", "positions", "send_rows_full", "send_rows_2_5", "send_rows_0_3_300"
    ]  # fmt: skip
    assert [o.name for o in model.graph.output] == ["hidden_states", *(f"kv_send_{layer}" for layer in range(4))]
    custom = [node for node in model.graph.node if node.domain == ops.DOMAIN]
    attributes = [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in custom]
    assert all((a["plugin_namespace"], a["plugin_version"]) == (b"pdtrim", b"1") for a in attributes)
    # blocks 0 1 2 4 5 run in prefill, 0 2 4 5 in decode: prefill layer 1 is sent to nobody
    assert [(n.op_type, a["layer_id"]) for n, a in zip(custom, attributes, strict=True)] == [
        ("SparseKVSend", 0), ("PagedAttention", 0), ("PagedAttention", 1), ("SparseKVSend", 1), ("PagedAttention", 2),
        ("SparseKVSend", 2), ("PagedAttention", 3), ("SparseKVSend", 3), ("PagedAttention", 4),
    ]  # fmt: skip


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
])  # fmt: skip
def test_rope_kinds(rope, tiny_model, make_stages, tmp_path):
    make_stages(tiny_model(tmp_path / "source", head_dim=32, rope_parameters=rope), tmp_path)
    result = build_target("onnx", tmp_path / "prefill", tmp_path / "engine")
    assert result.numerics.hidden_error < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_rope_frequencies_are_those_of_transformers(kind):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": kind, "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}  # fmt: skip
    config = LlamaConfig(head_dim=128, max_position_embeddings=65536, rope_parameters=dict(rope))
    positions = torch.arange(0, 65536, 251)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    table = rope_table(rope_settings({"rope_parameters": rope}), 128, 65536)[positions]
    torch.testing.assert_close(table, torch.cat((cos[0, :, :64], sin[0, :, :64]), dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "changes", "window"),
    [
        ("MistralForCausalLM", {"sliding_window": 512}, 512),
        ("MistralForCausalLM", {"sliding_window": 1024}, None),  # all positions that there are
        ("MistralForCausalLM", {"sliding_window": None}, None),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 400, "max_window_layers": 3}, 400),
        ("Qwen2ForCausalLM", {"use_sliding_window": False, "sliding_window": 400}, None),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 400, "max_window_layers": 6}, None),
    ],
)
def test_a_sliding_window_is_not_in_the_graph_and_said(
    architecture, changes, window, tiny_model, make_stages, tmp_path
):
    make_stages(tiny_model(tmp_path / "source", architecture, **changes), tmp_path)
    limits = [f"its attention has no sliding window: it matches the model up to {window} tokens"] if window else []
    result = build_target("onnx", tmp_path / "prefill", tmp_path / "engine")
    assert [limit for limit in result.limits if "window" in limit] == limits
    dry = build_target("tensorrt", tmp_path / "prefill", tmp_path / "described", {"dry_run": True})
    assert [limit for limit in dry.limits if "window" in limit] == limits


def test_a_builder_notes_how_far_it_is(tiny_stages, tmp_path):
    """In a process of its own, as a build starts it."""
    job = {"target": "onnx", "stage_dir": str(tiny_stages("LlamaForCausalLM") / "decode"), "options": {}}
    notes = []
    run_job(BUILDER, job | {"out_dir": str(tmp_path / "engine")}, tmp_path, os.environ, notes.append)
    layers, prompts = [f"graph: {at}/4 layers" for at in range(4)], len(PROMPTS)
    checks = [f"numerics check: {at}/{prompts} prompts" for at in range(prompts)]
    loading = ["writing and checking the graph", "numerics check: loading model and graph"]
    assert [note for note in notes if "g++" not in note] == [*layers, *loading, *checks]


def test_float16(tiny_stages, tmp_path):
    result = build_target("onnx", tiny_stages("Qwen3ForCausalLM") / "prefill", tmp_path / "e", {"dtype": "float16"})
    assert 1e-5 < result.numerics.hidden_error < 2e-2
    assert any("plan's pool and wire hold float32" in limit for limit in result.limits)


def test_int8(tiny_stages, tmp_path):
    native = build_target("onnx", tiny_stages("Qwen2ForCausalLM") / "decode", tmp_path / "native")
    result = build_target("onnx", tiny_stages("Qwen2ForCausalLM") / "decode", tmp_path / "int8", {"weights": "int8"})
    assert "MatMul" not in result.ops
    assert result.ops["MatMulNBits"] == 4 * 4
    assert 1e-3 < result.numerics.hidden_error < 0.5
    assert result.files["model.onnx"] < native.files["model.onnx"]
    assert any("int8 weights change logprobs" in limit for limit in result.limits)


def test_external_data_changes_nothing(tiny_stages, tmp_path):
    stage, ids = tiny_stages("LlamaForCausalLM") / "decode", torch.arange(20, 40)
    hidden = []
    for name, above in (("one", 1 << 40), ("two", 0)):
        result = build_target("onnx", stage, tmp_path / name, {"external_above": above})
        assert ("model.onnx.data" in result.files) == (name == "two")
        assert any("without onnxruntime's optimisations" in limit for limit in result.limits) == (name == "two")
        hidden.append(OnnxStage(tmp_path / name / "model.onnx").run(ids, torch.arange(20)).hidden)
    assert torch.equal(*hidden)


def test_ropes_table_counts_as_weights(tiny_stages, tmp_path):
    """Of a million positions it is what takes a graph beyond the 2 GiB that one file may have."""
    stage = read_stage(tiny_stages("LlamaForCausalLM") / "decode")
    weights = weight_bytes(stage.tensors, "float32")
    graph = build_graph(stage, tmp_path / "model.onnx", "float32", external_above=weights)
    assert len(graph.files) == 2


def test_the_same_stage_gives_the_same_bytes(tiny_stages, tmp_path):
    stage = tiny_stages("MistralForCausalLM") / "prefill"
    for name in "ab":
        build_target("onnx", stage, tmp_path / name)
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()


@pytest.mark.parametrize("tensor", ["l2.qkv.weight", "model.layers.1.post_attention_layernorm.weight", "rope_sin"])
def test_gate_stops_a_wrong_graph(tensor, tiny_stages, tmp_path):
    folder = tiny_stages("LlamaForCausalLM") / "prefill"
    build_target("onnx", folder, tmp_path / "engine")
    model = onnx.load(tmp_path / "engine" / "model.onnx")
    (weight,) = (w for w in model.graph.initializer if w.name == tensor)
    array = onnx.numpy_helper.to_array(weight).copy()
    array.reshape(array.shape[0], -1)[1] *= 1.01
    weight.raw_data = array.tobytes()
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(UserError, match=r"prefill: hidden differs from torch by .* tolerance 5e-05; do not serve"):
        check_numerics(read_stage(folder), tmp_path / "wrong.onnx", 5e-5)


@pytest.mark.parametrize("opset", [11, 99])
def test_a_wrong_opset(opset, tiny_stages, tmp_path, monkeypatch):
    """As an onnxruntime of another age would meet it: one sentence, the target named, nothing left."""
    from pdtrim_builders.targets import onnx as target

    build_graph = target.build_graph

    def stamped(*args, **kwargs):
        graph = build_graph(*args, **kwargs)
        model = onnx.load(graph.path)
        for functions in (model, *model.functions):
            next(entry for entry in functions.opset_import if not entry.domain).version = opset
        onnx.save(model, graph.path)
        return graph

    monkeypatch.setattr(target, "build_graph", stamped)
    with pytest.raises(UserError, match=r"^target onnx: .*onnxruntime cannot load this graph \(.*") as caught:
        build_target("onnx", tiny_stages("LlamaForCausalLM") / "decode", tmp_path / "engine")
    assert "\n" not in str(caught.value)
    assert "opset" in str(caught.value).lower() or "RMSNormalization" in str(caught.value)
    assert not (tmp_path / "engine").exists()


def test_gate_failure_leaves_the_old_engine(tiny_stages, tmp_path):
    stage = tiny_stages("LlamaForCausalLM") / "decode"
    build_target("onnx", stage, tmp_path / "engine")
    before = (tmp_path / "engine" / "engine.json").read_bytes()
    with pytest.raises(UserError, match="target onnx: decode: hidden differs"):
        build_target("onnx", stage, tmp_path / "engine", {"tolerance": 1e-12})
    assert (tmp_path / "engine" / "engine.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]


def edited(stages, tmp_path, **changes):
    folder = tmp_path / "prefill"
    shutil.copytree(stages("LlamaForCausalLM") / "prefill", folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "RoPE of kind 'yarn' is not supported"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "needs a positive factor, not None"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ({"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
    ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
    ({"dtype": "bfloat16"}, "onnxruntime has no kernels for dtype bfloat16 on the CPU; give option dtype"),
    ({"pdtrim": None}, "carries no plan"),
    ({"num_hidden_layers": 4}, "4 layers, the plan gives prefill 5"),
])  # fmt: skip
def test_refusals(changes, sentence, tiny_stages, tmp_path):
    with pytest.raises(UserError, match="^target onnx: .*" + sentence):
        build_target("onnx", edited(tiny_stages, tmp_path, **changes), tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_a_tensor_without_a_place_is_refused(tiny_stages, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = edited(tiny_stages, tmp_path)
    tensors = load_file(folder / "model.safetensors") | {"model.layers.0.self_attn.sinks": torch.zeros(4)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers.0.self_attn.sinks has no place in the graph of LlamaForCausalLM"):
        build_target("onnx", folder, tmp_path / "engine")


def test_a_weight_beyond_float16_is_refused(tiny_stages, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = edited(tiny_stages, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model.norm.weight has values that float16 cannot hold"):
        build_target("onnx", folder, tmp_path / "engine", {"dtype": "float16"})


@pytest.mark.parametrize(("name", "options", "sentence"), [
    ("openvino", {}, "target 'openvino' is unknown; use one of onnx, tensorrt-rtx, tensorrt, tensorrt-llm"),
    ("onnx", {"dtyp": "float16"}, "target onnx: option dtyp is unknown; use stage, .*dtype"),
    ("onnx", {"dtype": "int3"}, "target onnx: option dtype is 'int3'"),
    ("onnx", {"weights": "int8", "dtype": "float16"}, "target onnx: int8 weights need dtype float32"),
])  # fmt: skip
def test_names_and_options(name, options, sentence, tiny_stages, tmp_path):
    with pytest.raises(UserError, match=sentence):
        build_target(name, tiny_stages("LlamaForCausalLM") / "prefill", tmp_path / "engine", options)


def test_a_folder_of_others_is_left_alone(tiny_stages, tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UserError, match="exists and is not an engine"):
        build_target("onnx", tiny_stages("LlamaForCausalLM") / "prefill", tmp_path)
    assert (tmp_path / "photo.jpg").exists()


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_students_and_healed_weights_are_in_the_graph(stage, tiny_dir, cache, tmp_path):
    """The pair (1, 2) in both stages, its K and V those of block 1; one more block of decode with other weights."""
    from pdtrim_deploy.models import open_checkpoint
    from pdtrim_deploy.models.loading import load_model
    from pdtrim_deploy.models.surgery import write_stage
    from pdtrim_deploy.plan import Distilled, Drop, Keep, KVSend, PDPlan

    source, pair, keep = tiny_dir("Qwen3ForCausalLM"), Distilled(pair=(1, 2), kv_from=1), Keep()
    actions = {"prefill": (keep, pair, pair, keep, keep, keep), "decode": (keep, pair, pair, keep, Drop(), keep)}
    checkpoint, layers = open_checkpoint(source, cache), load_model(source).model.layers
    plan = PDPlan(model=checkpoint.shape("float32"), **actions, kv=(KVSend(),) * 4)
    changed = {1: {f"mlp.{name}": tensor for name, tensor in layers[2].mlp.state_dict().items()}}
    changed |= {3: {"mlp.down_proj.weight": layers[3].mlp.down_proj.weight * 0.7}} if stage == "decode" else {}
    data = plan.model_dump(mode="json")
    write_stage(checkpoint, tmp_path / stage, plan.layers(stage), "float32", data, replacements=changed)
    result = build_target("onnx", tmp_path / stage, tmp_path / "engine")
    assert result.numerics.hidden_error < 2e-5  # against transformers on the written stage
    write_stage(checkpoint, tmp_path / "plain" / stage, plan.layers(stage), "float32", data)
    with pytest.raises(UserError, match="hidden differs from torch"):
        check_numerics(read_stage(tmp_path / "plain" / stage), tmp_path / "engine" / "model.onnx", 5e-5)
