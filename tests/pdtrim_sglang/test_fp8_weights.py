"""FP8 stages as the serving side reads them: SGLang's rules for modules, and compressed-tensors' own arithmetic."""

import json

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("sglang", reason="needs the serve environment")
from sglang.srt.layers.quantization.compressed_tensors.utils import should_ignore_layer
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp8Config
from sglang.srt.layers.quantization.utils import is_layer_skipped
from tinyfp8 import KINDS, write_fp8

from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.surgery import write_stage

BLOCKS = [0, 2, 3, 5]
MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
MODULES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def skips(kind, folder):
    """Whether SGLang gives a module of the folder unquantised weights."""
    config = json.loads((folder / "config.json").read_text()).get("quantization_config")
    if kind.startswith("compressed"):
        return lambda module: should_ignore_layer(module, config["ignore"], MAPPING)
    if kind.startswith("modelopt"):
        read = ModelOptFp8Config.from_config(config or json.loads((folder / "hf_quant_config.json").read_text()))
        assert read.kv_cache_quant_algo is None  # pools are the plan's
        return lambda module: is_layer_skipped(module, read.exclude_modules, MAPPING) or read.is_layer_excluded(module)
    return lambda module: is_layer_skipped(module, Fp8Config.from_config(config).ignored_layers, MAPPING)


@pytest.mark.parametrize("kind", KINDS)
def test_sglang_finds_codes_where_a_stage_has_them(kind, tiny_llama_dir, tmp_path):
    source = write_fp8(tiny_llama_dir, tmp_path / "source", kind)
    write_stage(resolve(f"hf:{source}", Cache(tmp_path / "cache")), tmp_path / "stage", BLOCKS, "bfloat16", {})
    stored, skipped = load_file(tmp_path / "stage" / "model.safetensors"), skips(kind, tmp_path / "stage")
    assert skipped("lm_head")
    for index in range(len(BLOCKS)):
        for module in MODULES:
            name = f"model.layers.{index}.{module}"
            part = next((part for fused, (part, *_) in MAPPING.items() if name.endswith(fused)), None)
            disk = name if part is None else f"{name.rpartition('.')[0]}.{part}"
            assert skipped(name) == (stored[f"{disk}.weight"].dtype == torch.bfloat16), name
            assert skipped(name) == ((index, module) == (1, "mlp.down_proj")), name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("compressed")])
def test_compressed_tensors_reads_the_same_weights(kind, tiny_llama_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write_fp8(tiny_llama_dir, tmp_path / "source", kind)
    model, ids = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), torch.arange(3, 33)[None]
    expected = model(ids).logits  # their weights are decompressed when they are first used
    state = model.state_dict()
    for name, weight in load_model(folder).state_dict().items():
        assert torch.equal(state[name], weight), name
    # they round each token's input to FP8 as well
    error = (load_model(folder, rounds_inputs=True)(ids).logits - expected).abs().max()
    assert error <= 1e-3 * expected.abs().max()
    assert (load_model(folder)(ids).logits - expected).abs().max() > 20 * error
