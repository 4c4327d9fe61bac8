"""TensorRT targets: real engines where tensorrt-rtx is installed, and how they refuse and fail."""

import importlib.util
import shutil
import sys
from pathlib import Path

import onnx
import pytest
from pdtrim_builders import build_target
from pdtrim_builders.graph.build import build_graph
from pdtrim_builders.graph.stage import read_stage
from pdtrim_builders.targets import tensorrt

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.job import run_job
from pdtrim_deploy.models import open_checkpoint
from pdtrim_deploy.models.surgery import write_stage
from pdtrim_deploy.plan import Keep, KVSend, PDPlan

rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed (pip install tensorrt-rtx)"
)


@rtx
@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])  # with bias; with head norms
def test_engine(architecture, stage, tiny_stages, tmp_path):
    options = {"compute_capabilities": ("8.0", "12.0"), "most_tokens": 64, "usual_tokens": 16}
    result = build_target("tensorrt-rtx", tiny_stages(architecture) / stage, tmp_path / "engine", options)
    plugins = {"PagedAttention": 5, "SparseKVSend": 4} if stage == "prefill" else {"PagedAttention": 4}
    assert (result.status, result.dtype, result.plugins) == ("built", "float16", plugins)
    plan = (tmp_path / "engine" / "engine.plan").read_bytes()
    assert plan[:4] == b"vtrt"
    assert len(plan) == result.files["engine.plan"]
    assert result.numerics.hidden_error < 2e-2
    assert result.peak_memory > 100e6
    assert result.run is None
    assert (result.details["aux_streams"], result.details["most_tokens"]) == (0, 64)
    assert any("Hopper" in limit for limit in result.limits)
    assert sorted(p.name for p in (tmp_path / "engine").iterdir()) == ["engine.json", "engine.plan"]


@rtx
def test_a_layer_for_its_kv_alone(tiny_dir, make_stages, tmp_path):
    make_stages(tiny_dir("LlamaForCausalLM"), tmp_path, alone=4)
    options = {"compute_capabilities": ("8.0",), "most_tokens": 64, "usual_tokens": 16}
    result = build_target("tensorrt-rtx", tmp_path / "prefill", tmp_path / "engine", options)
    assert result.plugins == {"PagedAttention": 4, "KVWrite": 1, "SparseKVSend": 4}
    assert b"KVWrite" in (tmp_path / "engine" / "engine.plan").read_bytes()


@rtx
def test_quantised_wire(tiny_llama_dir, cache, tmp_path):
    """Layers on the wire as int8 and fp8 leave the engine as bytes; as int4 they are refused."""
    checkpoint = open_checkpoint(tiny_llama_dir, cache)
    for wires in (("native", "int8", "fp8"), ("native", "int8", "int4")):
        kv = tuple(KVSend(mode="sparse", n_first=1, n_last=2, wire_dtype=wires[layer % 3]) for layer in range(6))
        keep = (Keep(),) * 6
        plan = PDPlan(model=checkpoint.shape("float16"), prefill=keep, decode=keep, kv=kv)
        write_stage(checkpoint, tmp_path / "prefill", range(6), "float16", plan.model_dump(mode="json"))
        if "int4" in wires:
            with pytest.raises(
                UserError, match=r"^target tensorrt-rtx: SparseKVSend does not support wire dtype int4, which 2 la"
            ):
                build_target("tensorrt-rtx", tmp_path / "prefill", tmp_path / "engine")
            continue
        result = build_target("tensorrt-rtx", tmp_path / "prefill", tmp_path / "engine", {"most_tokens": 256})
        assert result.plugins["SparseKVSend"] == 6
        assert result.details["outputs"][1:4] == [
            "kv_send_0 half [2, -1, 32]", "kv_send_1 int8 [-1]", "kv_send_2 int8 [-1]"
        ]  # fmt: skip


@rtx
def test_an_inlined_plugin_is_noticed(tiny_stages, tmp_path):
    """Without plugin_namespace TensorRT's parser takes the function's body, and says nothing."""
    stage = read_stage(tiny_stages("LlamaForCausalLM") / "prefill")
    graph = build_graph(stage, tmp_path / "model.onnx", "float16")
    model = onnx.load(graph.path)
    node = next(n for n in model.graph.node if n.op_type == "SparseKVSend")
    attributes = [a for a in node.attribute if not a.name.startswith("plugin_")]
    del node.attribute[:]
    node.attribute.extend(attributes)
    onnx.save(model, graph.path)
    with pytest.raises(UserError, match=r"PLUGIN layers are .*'SparseKVSend': 3.* the graph has .*'SparseKVSend': 4"):
        run_worker(graph.path, tmp_path, {"PagedAttention": 5, "SparseKVSend": 4})


@rtx
def test_an_op_that_tensorrt_lacks(tiny_stages, tmp_path):
    stage = read_stage(tiny_stages("LlamaForCausalLM") / "decode")
    graph = build_graph(stage, tmp_path / "model.onnx", "float16")
    model = onnx.load(graph.path)
    next(n for n in model.graph.node if n.op_type == "Sigmoid").op_type = "Unheard"
    onnx.save(model, graph.path)
    with pytest.raises(UserError, match=r"its parser refuses the graph: .*Unheard"):
        run_worker(graph.path, tmp_path, {"PagedAttention": 4})


def run_worker(graph, scratch, plugins):
    job = {
        "module": "tensorrt_rtx", "graph": str(graph), "plan": str(scratch / "plan"), "plugin_library": None,
        "plugins": plugins, "compute_capabilities": ["SM89"], "usual_tokens": 8, "most_tokens": 64, "magic": "vtrt",
    }  # fmt: skip
    command = [sys.executable, "-m", "pdtrim_builders.targets.tensorrt_worker"]
    run_job(command, job, scratch, tensorrt._environment(tensorrt.RTX_FLAVOUR, scratch / "libraries"))


@pytest.mark.parametrize("name", ["tensorrt-rtx", "tensorrt"])
def test_dry_run(name, tiny_stages, tmp_path):
    result = build_target(name, tiny_stages("LlamaForCausalLM") / "prefill", tmp_path / "engine", {"dry_run": True})
    assert result.status == "described"
    assert result.plugins == {"PagedAttention": 5, "SparseKVSend": 4}
    assert any("count 9 PLUGIN layers" in step for step in result.details["would"])
    assert [p.name for p in (tmp_path / "engine").iterdir()] == ["engine.json"]


@pytest.mark.parametrize(("name", "options", "sentence"), [
    ("tensorrt-rtx", {"compute_capabilities": ("9.0",)}, "compute capability 9.0 is not supported; use some of 7.5"),
    ("tensorrt-rtx", {"most_tokens": 8}, "usual_tokens 256 is above most_tokens 8"),
    ("tensorrt-rtx", {"plugin_library": Path("nowhere.so")}, "nowhere.so: no such plugin library"),
    ("tensorrt", {"compute_capabilities": ("9.0",)}, "option compute_capabilities is unknown"),
])  # fmt: skip
def test_options(name, options, sentence, tiny_stages, tmp_path):
    with pytest.raises(UserError, match=rf"^target {name}: .*{sentence}"):
        build_target(name, tiny_stages("LlamaForCausalLM") / "prefill", tmp_path / "engine", options)
    assert not (tmp_path / "engine").exists()


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU host builds this target")
def test_tensorrt_needs_a_gpu_host(tiny_stages, tmp_path, monkeypatch):
    stage = tiny_stages("LlamaForCausalLM") / "prefill"
    with pytest.raises(UserError, match=r"^target tensorrt: Python package tensorrt is not installed"):
        build_target("tensorrt", stage, tmp_path / "engine")
    (tmp_path / "site" / "tensorrt").mkdir(parents=True)
    (tmp_path / "site" / "tensorrt" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(UserError, match=r"^target tensorrt: TensorRT builds for the GPU at hand and there is none"):
        build_target("tensorrt", stage, tmp_path / "engine")
