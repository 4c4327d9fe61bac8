"""Checkpoints of modelopt for TensorRT-LLM, read back: every weight within its code's step of the stage's."""

import json
import shlex

import pytest
import torch
from pdtrim_builders import build_target
from pdtrim_builders.graph.stage import read_stage
from safetensors.torch import load_file

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import open_checkpoint
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.surgery import write_stage

HF = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
BY_INPUT = ("attention.dense", "mlp.proj")


def put_together(parts, name):
    """A linear weight of all ranks; Q of all ranks, then K, then V."""
    if name.endswith(BY_INPUT):
        return torch.cat(parts, 1)
    if name.endswith("attention.qkv"):
        heads = [part.split([64 // len(parts), 32 // len(parts), 32 // len(parts)]) for part in parts]
        return torch.cat([torch.cat(side) for side in zip(*heads, strict=True)])
    return torch.cat(parts)


def dequantised(ranks, name):
    """A linear weight, and half the step to its neighbouring codes: e4m3's widest step is 32."""
    weights, steps = [], []
    for rank in ranks:
        codes, scale = rank[f"{name}.weight"], rank[f"{name}.weights_scaling_factor"]
        factor = (scale[:, None] if scale.numel() > 1 else scale).expand(codes.shape)
        if f"{name}.prequant_scaling_factor" in rank:
            factor = factor * rank[f"{name}.prequant_scaling_factor"].float()
        weights.append(codes.float() * factor)
        steps.append(factor * (0.5 if codes.dtype == torch.int8 else 16))
    return put_together(weights, name), put_together(steps, name)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_every_weight_comes_back(architecture, kind, tiny_stages, tmp_path):
    folder = tiny_stages(architecture) / "decode"
    options = {"quantisation": kind, "tensor_parallel": (1, 2)}
    result = build_target("tensorrt-llm", folder, tmp_path / "decode", options)
    assert result.dtype == "bfloat16"
    assert result.state == "checked"
    assert 0 < abs(result.details["loss_after"] - result.details["loss_before"]) < 0.1
    source = load_file(folder / "model.safetensors")
    for size in (1, 2):
        out = tmp_path / "decode" / f"tp{size}"
        config = json.loads((out / "config.json").read_text())
        assert config["quantization"]["quant_algo"] == {"fp8": "FP8", "int8": "W8A8_SQ_PER_CHANNEL"}[kind]
        assert (config["architecture"], config["mapping"]["tp_size"]) == (architecture, size)
        assert (config["rotary_base"], config["num_hidden_layers"], config["dtype"]) == (10000.0, 4, "bfloat16")
        ranks = [load_file(out / f"rank{rank}.safetensors") for rank in range(size)]
        codes = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}[kind]
        for layer in range(4):
            for trt_name, ours in HF.items():
                name = f"transformer.layers.{layer}.{trt_name}"
                assert ranks[0][f"{name}.weight"].dtype == codes
                assert f"{name}.activation_scaling_factor" in ranks[0]
                expected = torch.cat([source[f"model.layers.{layer}.{name_}.weight"] for name_ in ours])
                got, step = dequantised(ranks, name)
                error = (got - expected).abs()
                assert error.max() > 0, name
                assert (error <= step + expected.abs().max() / 128).all(), name  # the weights were bfloat16 before
            name, ours = f"transformer.layers.{layer}", f"model.layers.{layer}"
            norm = source[f"{ours}.input_layernorm.weight"].to(torch.bfloat16)
            assert torch.equal(ranks[-1][f"{name}.input_layernorm.weight"], norm)
            assert (f"{name}.attention.qkv.bias" in ranks[0]) == (architecture == "Qwen2ForCausalLM")
            if architecture == "Qwen2ForCausalLM":
                biases = [rank[f"{name}.attention.qkv.bias"] for rank in ranks]
                expected = torch.cat(
                    [source[f"{name_}.bias"] for name_ in (f"{ours}.{side}" for side in HF["attention.qkv"])]
                )
                assert torch.equal(put_together(biases, f"{name}.attention.qkv"), expected.to(torch.bfloat16))
        for trt_name, name_ in (("vocab_embedding", "embed_tokens"), ("ln_f", "norm")):
            got = [rank[f"transformer.{trt_name}.weight"] for rank in ranks]
            joined = torch.cat(got) if trt_name == "vocab_embedding" and config["use_parallel_embedding"] else got[0]
            assert torch.equal(joined, source[f"model.{name_}.weight"].to(torch.bfloat16))


def _planned(folder, source):
    """`folder` with the plan of `source`."""
    config = json.loads((folder / "config.json").read_text())
    plan = json.loads((source / "config.json").read_text())["pdtrim"]
    (folder / "config.json").write_text(json.dumps(config | {"pdtrim": plan}))
    return folder


def test_fp8_for_the_pytorch_backend(tiny_stages, tmp_path):
    folder = tiny_stages("LlamaForCausalLM") / "decode"
    options = {
        "quantisation": "fp8",
        "versions": ("1.3",),
        "prompts": ("The quick brown fox.", "x", "Lorem ipsum dolor"),
    }
    result = build_target("tensorrt-llm", folder, tmp_path / "decode", options)
    assert sorted({name.split("/")[0] for name in result.files}) == [
        "commands.txt", "disaggregated.yaml", "hf-fp8", "llm-api.yaml"
    ]  # fmt: skip
    hf = tmp_path / "decode" / "hf-fp8"
    assert json.loads((hf / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "FP8"
    config = json.loads((hf / "config.json").read_text())
    assert (config["num_hidden_layers"], config["quantization_config"]["quant_method"]) == (4, "modelopt")
    got, source = load_file(hf / "model.safetensors"), load_file(folder / "model.safetensors")
    for name, expected in source.items():
        scale = got.get(f"{name}_scale", torch.zeros(()))
        restored = got[name].float() * (scale if scale else 1)
        assert (restored - expected).abs().max() <= 16 * scale + expected.abs().max() / 128, name
    assert (hf / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    checkpoint = open_checkpoint(hf, Cache(tmp_path / "cache"))  # what modelopt writes is a source of ours
    assert checkpoint.quantized.method == "modelopt"
    for name, weight in load_model(hf).state_dict().items():
        scale = got.get(f"{name}_scale", torch.ones(()))
        assert torch.equal(weight, got[name].float() * scale), name
    write_stage(checkpoint, tmp_path / "again", [1, 3], "bfloat16", {})
    with pytest.raises(UserError, match="no engine computes with weights in FP8 in modelopt format"):
        read_stage(_planned(tmp_path / "again", folder), "decode")
    serve = next(
        shlex.split(line)
        for line in (tmp_path / "decode" / "commands.txt").read_text().splitlines()
        if line.startswith("trtllm-serve")
    )
    assert (tmp_path / "decode" / serve[1]).resolve() == hf.resolve()  # decode, whose layers both stages run


def test_int8_is_for_1_2(tiny_stages, tmp_path):
    folder = tiny_stages("MistralForCausalLM") / "decode"
    result = build_target("tensorrt-llm", folder, tmp_path / "e", {"quantisation": "int8"})
    assert any("int8 is written for 1.2 only" in limit for limit in result.limits)
    assert "hf-fp8" not in {name.split("/")[0] for name in result.files}


@pytest.mark.parametrize(("architecture", "options", "sentence"), [
    ("Qwen3ForCausalLM", {}, "Qwen3ForCausalLM cannot be quantised; supported: Llama"),
    ("LlamaForCausalLM", {"tensor_parallel": (4,)}, "2 KV heads cannot be split over tensor_parallel 4 when quantised"),
    ("LlamaForCausalLM", {"dtype": "float32"}, "quantisation needs a dtype of 16 bits around it"),
    ("LlamaForCausalLM", {"prompts": ("",)}, "no calibration text with two tokens"),
])  # fmt: skip
def test_refusals(architecture, options, sentence, tiny_stages, tmp_path):
    with pytest.raises(UserError, match=f"^target tensorrt-llm: .*{sentence}"):
        build_target(
            "tensorrt-llm", tiny_stages(architecture) / "decode", tmp_path / "e", {"quantisation": "fp8", **options}
        )
    assert not (tmp_path / "e").exists()
