"""Graphs in bfloat16: executed as such against torch, and widened where onnxruntime checks them."""

import importlib.util

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from pdtrim_builders import build_target
from pdtrim_builders.graph.build import build_graph
from pdtrim_builders.graph.stage import read_stage
from pdtrim_builders.graph.widen import widened
from pdtrim_builders.numerics import check_numerics
from pdtrim_builders.runtime_onnx import OnnxStage
from tinyfamilies import taking

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.loading import load_model

TOKENS = 48
rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed (pip install tensorrt-rtx)"
)


@pytest.fixture(scope="session")
def bfloat16_stages(tiny_dir, make_stages, tmp_path_factory):
    """bfloat16_stages("Qwen3ForCausalLM"): a folder with that family's stages in bfloat16. Read it only."""
    return lambda architecture: make_stages(
        tiny_dir(architecture), tmp_path_factory.mktemp("stages"), dtype="bfloat16", alone=4
    )


def relative(result, expected):
    """Norm of the difference over the norm."""
    return ((result.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("architecture", taking("engines"))
def test_it_is_as_near_to_float32_as_torch_in_bfloat16(architecture, bfloat16_stages, tmp_path):
    """Every op rounds to bfloat16 in onnx's own evaluator, whose order of sums is not torch's."""
    folder = bfloat16_stages(architecture) / "prefill"
    graph = build_graph(read_stage(folder), tmp_path / "model.onnx", "bfloat16")
    model, ids = onnx.load(graph.path), torch.arange(TOKENS) * 7 % 240 + 1
    weights = {weight.name: weight.data_type for weight in model.graph.initializer}
    kinds = onnx.TensorProto
    assert weights["embed_tokens"] == weights["model.norm.weight"] == kinds.BFLOAT16
    assert weights["rope_cos"] == kinds.FLOAT  # with 8 bits, angles of near positions would be the same
    rows = {i.name: np.arange(3) for i in model.graph.input if i.name.startswith("send_rows_")}
    feeds = {"input_ids": ids.numpy(), "positions": np.arange(TOKENS), **rows}
    hidden, *packed = ReferenceEvaluator(model).run(None, feeds)
    assert {str(value.dtype) for value in (hidden, *packed)} == {"bfloat16"}
    with torch.no_grad():
        narrow, exact = (
            load_model(folder, "bfloat16").to(dtype).model(ids[None]).last_hidden_state[0].float()
            for dtype in (torch.bfloat16, torch.float32)
        )
    result = torch.from_numpy(hidden.astype(np.float32))
    assert relative(result, exact) < 2.5 * relative(narrow, exact) < 0.06


@pytest.mark.parametrize("external_above", [0, 1 << 40])
@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_widened_it_has_the_same_weights_and_is_exact(stage, external_above, bfloat16_stages, tmp_path):
    facts = read_stage(bfloat16_stages("Qwen2ForCausalLM") / stage)
    graph = build_graph(facts, tmp_path / "model.onnx", "bfloat16", external_above=external_above)
    assert (len(graph.files) == 2) == (external_above == 0)
    numerics = check_numerics(facts, graph.path, 5e-5, dtype="bfloat16")
    assert numerics.hidden_error < 2e-5
    assert (numerics.kv_error or 0) < 2e-5


def test_a_wrong_bfloat16_weight_fails_the_check(bfloat16_stages, tmp_path):
    facts = read_stage(bfloat16_stages("LlamaForCausalLM") / "decode")
    graph = build_graph(facts, tmp_path / "model.onnx", "bfloat16")
    model = onnx.load(graph.path)
    weight = next(w for w in model.graph.initializer if w.name == "l1.down.weight")
    weight.raw_data = bytes([weight.raw_data[0], weight.raw_data[1] ^ 0x80]) + weight.raw_data[2:]  # a sign
    onnx.save(model, graph.path)
    with pytest.raises(UserError, match="hidden differs from torch"):
        check_numerics(facts, graph.path, 5e-5, dtype="bfloat16")


def test_onnxruntime_refuses_bfloat16_in_one_sentence(bfloat16_stages, tmp_path):
    folder = bfloat16_stages("LlamaForCausalLM") / "prefill"
    with pytest.raises(UserError, match=r"onnxruntime has no kernels for dtype bfloat16 on the CPU; give option dtype"):
        build_target("onnx", folder, tmp_path / "engine")
    with pytest.raises(UserError, match=r"option dtype is .bfloat16.: Input should be .float32. or .float16."):
        build_target("onnx", folder, tmp_path / "engine", {"dtype": "bfloat16"})
    graph = build_graph(read_stage(folder), tmp_path / "model.onnx", "bfloat16")
    with pytest.raises(UserError, match="onnxruntime cannot load this graph"):
        OnnxStage(graph.path)
    assert OnnxStage(widened(graph.path)).dtype == torch.float32


@rtx
@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_an_engine_of_a_bfloat16_stage_is_in_bfloat16(stage, bfloat16_stages, tmp_path):
    """As the shipped recipes of 8B models are; nobody has to say the dtype."""
    options = {"compute_capabilities": ("8.0",), "most_tokens": 64, "usual_tokens": 16}
    folder = bfloat16_stages("Qwen3ForCausalLM") / stage
    result = build_target("tensorrt-rtx", folder, tmp_path / "engine", options)
    assert (result.status, result.dtype) == ("built", "bfloat16")
    assert result.details["outputs"][0] == "hidden_states bf16 [-1, 64]"
    assert result.details["aux_streams"] == 0
    assert result.numerics.hidden_error < 2e-5
    assert not any("plan's pool and wire" in limit for limit in result.limits)
    assert "bfloat16 weights widened" in result.checked[0]
    assert sorted(p.name for p in (tmp_path / "engine").iterdir()) == ["engine.json", "engine.plan"]
