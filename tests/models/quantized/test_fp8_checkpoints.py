"""FP8 checkpoints as sources: read as what codes and scales stand for, written in the format they came in."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tinyfp8 import IGNORED, KINDS, write_fp8

from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.config import read_config
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.quantized import with_quantization
from pdtrim_deploy.models.streaming import stream_model
from pdtrim_deploy.models.surgery import write_stage
from pdtrim_deploy.models.weights import ModelSizes, stored_bytes
from pdtrim_deploy.worker.memory import worker_memory

BLOCKS = [0, 2, 3, 5]
IDS = torch.arange(3, 43).reshape(2, 20)
CODES = torch.float8_e4m3fn


def logits(model):
    return model(IDS, use_cache=False).logits


@pytest.fixture(params=KINDS)
def folder(request, tiny_llama_dir, tmp_path):
    return write_fp8(tiny_llama_dir, tmp_path / "source", request.param)


def test_is_read_as_the_weights_that_it_stands_for(folder, cache):
    checkpoint = resolve(f"hf:{folder}", cache)
    expected = logits(load_model(folder.with_name("source-float")))
    assert torch.equal(logits(load_model(folder)), expected)
    assert torch.equal(logits(stream_model(checkpoint, 2)[0]), expected)
    assert checkpoint.facts.dtype == "float32"
    assert not [name for name in checkpoint.tensors if name.endswith(("k_proj.k_scale", "v_proj.v_scale"))]


def test_a_cpu_worker_is_priced_in_float32_and_one_on_a_gpu_by_what_is_stored(folder, cache):
    """One matrix of 42 is not quantised, and small blocks have many scales: both are left out."""
    config = with_quantization(folder, read_config(folder / "config.json"))
    stored = sum(info.nbytes for info in resolve(f"hf:{folder}", cache).tensors.values())
    assert stored_bytes(config, "float32") == pytest.approx(stored, rel=0.15)
    plain = worker_memory(read_config(folder.with_name("source-float") / "config.json"), "float32", 64).weights
    assert worker_memory(config, "float32", 64).weights == plain > 2 * stored
    ends = ModelSizes.of(config).ends
    assert worker_memory(config, "bfloat16", 64).weights == plain - 2 * ends


def test_stages_keep_codes_and_scales_to_the_bit(folder, cache, tmp_path):
    checkpoint = resolve(f"hf:{folder}", cache)
    write_stage(checkpoint, tmp_path / "stage", BLOCKS, "float32", {})
    source, stage = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "stage"))
    stays = {name for name in source if not name.endswith(("k_proj.k_scale", "v_proj.v_scale"))}
    for name in stays:
        number = int(name.split(".")[2]) if "layers." in name else None
        if number is None or number in BLOCKS:
            new = name if number is None else name.replace(f".{number}.", f".{BLOCKS.index(number)}.", 1)
            tensor = stage.pop(new)
            assert tensor.dtype == source[name].dtype
            assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (tensor, source[name]))), name
    assert not stage
    again = resolve(f"hf:{tmp_path / 'stage'}", cache)  # a stage is a checkpoint of that format
    assert (again.quantized.method, again.quantized.block) == (checkpoint.quantized.method, checkpoint.quantized.block)
    settings = [json.dumps(json.loads((tmp_path / "stage" / name).read_text())) for name in ("config.json",)]
    if (file := tmp_path / "stage" / "hf_quant_config.json").exists():
        settings.append(file.read_text())
    assert any("model.layers.1.mlp.down_proj" in text for text in settings)  # was block 2
    assert not any("layers.2." in text or '"kv_cache_quant_algo": "FP8"' in text for text in settings)


def test_replaced_weights_get_codes_of_the_same_kind(folder, cache, tmp_path):
    checkpoint = resolve(f"hf:{folder}", cache)
    generator = torch.Generator().manual_seed(5)
    down, zeros = torch.randn(64, 128, generator=generator), torch.zeros(64, 64)
    down[7] = 0
    changes = {
        2: {"mlp.down_proj.weight": down},  # which is not quantised
        3: {"mlp.down_proj.weight": down, "self_attn.o_proj.weight": zeros},
    }
    write_stage(checkpoint, tmp_path / "stage", BLOCKS, "float32", {}, replacements=changes)
    source, stored = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "stage"))
    for name in ("mlp.down_proj", "self_attn.o_proj"):
        for leaf in ("weight", checkpoint.quantized.scale):
            before, after = source[f"model.layers.3.{name}.{leaf}"], stored[f"model.layers.2.{name}.{leaf}"]
            assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert torch.equal(stored["model.layers.1.mlp.down_proj.weight"], down)  # the ignored module, of block 2
    layer = load_model(tmp_path / "stage").model.layers[2]
    assert torch.equal(layer.self_attn.o_proj.weight, zeros)
    error = (layer.mlp.down_proj.weight - down).abs()
    assert (error <= down.abs() / 16 + down.abs().max() / 2**9).all()  # half of e4m3's step
    assert error.max() > 0
    assert torch.equal(layer.mlp.down_proj.weight[7], torch.zeros(128))
    used = stored["model.layers.2.mlp.down_proj.weight"].float().abs().max()
    assert used >= 416  # the largest value has (nearly, with a bfloat16 scale) the largest code


def test_ignored_modules_are_there(folder):
    assert load_file(folder / "model.safetensors")[f"{IGNORED}.weight"].dtype == torch.float32


def test_transformers_reads_the_same_weights(tiny_llama_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write_fp8(tiny_llama_dir, tmp_path / "source", "fp8-block")
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, weight in load_model(folder).state_dict().items():
        assert torch.equal(state[name], weight), name


def test_scales_may_lie_in_another_shard(tiny_llama_dir, tmp_path, cache):
    folder = write_fp8(tiny_llama_dir, tmp_path / "source", "fp8-block")
    shards = {"stage": 4_000_000_000, "sharded": 30_000}
    for name, size in shards.items():
        write_stage(resolve(f"hf:{folder}", cache), tmp_path / name, BLOCKS, "float32", {}, max_shard_bytes=size)
    files = list((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(files) > 3
    assert torch.equal(*(logits(load_model(tmp_path / name)) for name in shards))
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    stored = [tensor.nbytes for file in files for tensor in load_file(file).values()]
    assert index["metadata"]["total_size"] == sum(stored)
    places = index["weight_map"]
    scaled = [name for name in places if f"{name}_scale_inv" in places]
    assert any(places[name] != places[f"{name}_scale_inv"] for name in scaled)


@pytest.mark.parametrize("kind", ["fp8-block", "compressed-channel"])
def test_experts_are_stacked_of_their_codes(kind, tiny_dir, tmp_path, cache):
    folder = write_fp8(tiny_dir("Qwen3MoeForCausalLM"), tmp_path / "source", kind)
    checkpoint = resolve(f"hf:{folder}", cache)
    whole = load_model(folder)
    assert torch.equal(logits(whole), logits(load_model(folder.with_name("source-float"))))
    assert torch.equal(logits(stream_model(checkpoint, 2)[0]), logits(whole))
    experts = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(2))
    write_stage(
        checkpoint, tmp_path / "stage", [1, 4], "float32", {}, replacements={4: {"mlp.experts.down_proj": experts}}
    )
    after = load_model(tmp_path / "stage").model.layers[1].mlp.experts
    assert ((after.down_proj - experts).abs() <= experts.abs() / 14 + experts.abs().max() / 400).all()
    assert torch.equal(after.gate_up_proj, whole.model.layers[4].mlp.experts.gate_up_proj)
    stored = load_file(tmp_path / "stage" / "model.safetensors")
    assert stored["model.layers.1.mlp.experts.3.down_proj.weight"].dtype == CODES
