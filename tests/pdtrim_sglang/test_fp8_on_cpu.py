"""Layers of SGLang with a stage's FP8 weights, on a CPU: they multiply as the oracle's, in every format."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("sglang", reason="needs the serve environment")
from decodeworker import sglang
from pdtrim_sglang.cpu.fp8_weights import compute_fp8_by_torch
from pdtrim_sglang.patches import loading
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp8Config
from sglang.srt.model_loader.loader import DefaultModelLoader
from tinyfp8 import BLOCK, KINDS, write_fp8

from pdtrim_deploy.local.cache import Cache
from pdtrim_deploy.models import resolve
from pdtrim_deploy.models.loading import load_model
from pdtrim_deploy.models.surgery import write_stage

MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
CONFIGS = {"compressed-tensors": CompressedTensorsConfig, "fp8": Fp8Config, "modelopt": ModelOptFp8Config}
BLOCKS = [0, 2, 3, 5]
UNQUANTISED = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module", autouse=True)
def server():
    with sglang():
        yield


def layers_of(quant_config, prefix):
    """SGLang's four maps of a block of the tiny model, with the names of what each is fused from."""
    options = {
        "bias": False,
        "params_dtype": torch.bfloat16,
        "quant_config": quant_config,
        "parallel_group": "replicated",
    }
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    return {
        attention: (QKVParallelLinear(64, 16, 4, 2, prefix=f"{attention}.qkv_proj", **options), "qkv"),
        f"{attention}.o_proj": (RowParallelLinear(64, 64, prefix=f"{attention}.o_proj", **options), None),
        mlp: (MergedColumnParallelLinear(64, [128, 128], prefix=f"{mlp}.gate_up_proj", **options), ("gate", "up")),
        f"{mlp}.down_proj": (RowParallelLinear(128, 64, prefix=f"{mlp}.down_proj", **options), None),
    }


def load(layer, name, parts, stored):
    """As SGLang's models load: each part into its shard, by the parameter's own loader."""
    for parameter_name, parameter in layer.named_parameters():
        if parts is None:
            parameter.weight_loader(parameter, stored[f"{name}.{parameter_name}"])
            continue
        for number, part in enumerate(parts):
            shard = part if parts == "qkv" else number
            parameter.weight_loader(parameter, stored[f"{name}.{part}_proj.{parameter_name}"], shard)


def product(layer, states):
    return layer.quant_method.apply(layer, states)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_the_oracles(kind, tiny_llama_dir, tmp_path):
    source = write_fp8(tiny_llama_dir, tmp_path / "source", kind)
    folder = tmp_path / "stage"
    write_stage(resolve(f"hf:{source}", Cache(tmp_path / "cache")), folder, BLOCKS, "bfloat16", {})
    settings = json.loads((folder / "config.json").read_text()).get("quantization_config")
    settings = settings or json.loads((folder / "hf_quant_config.json").read_text())
    quant_config = CONFIGS[settings.get("quant_method", "modelopt")].from_config(settings)
    quant_config.packed_modules_mapping = MAPPING
    stored, oracle = load_file(folder / "model.safetensors"), load_model(folder, rounds_inputs=True)
    for prefix in ("model.layers.0", "model.layers.1"):
        layers = layers_of(quant_config, prefix)
        model = torch.nn.ModuleList(layer for layer, _ in layers.values())
        for name, (layer, parts) in layers.items():
            load(layer, name, parts, stored)
        loading.compute_fp8_by_torch(model, torch.device("cpu"))
        for name, (layer, parts) in layers.items():
            layer.quant_method.process_weights_after_loading(layer)
            names = [name] if parts is None else [f"{name}.{part}_proj" for part in parts]
            states = (
                torch.randn(5, layer.weight.shape[1], generator=torch.Generator().manual_seed(7)).bfloat16().float()
            )
            expected = torch.cat([oracle.get_submodule(each)(states) for each in names], -1)
            if name == UNQUANTISED:
                assert layer.weight.dtype == torch.bfloat16
                continue
            torch.testing.assert_close(product(layer, states), expected, rtol=0, atol=1e-5)
            assert product(layer, states.bfloat16()).dtype == torch.bfloat16
            unrounded = torch.cat([states @ oracle.get_submodule(each).weight.T for each in names], -1)
            assert (expected - unrounded).abs().max() > 1e-3, "nothing was rounded"


def test_of_fused_maps_the_largest_stored_scale_holds_and_each_has_its_own_weights():
    """SGLang's kernels for GPUs round the input of q, k and v under one scale; without one a shard has the first's."""
    layer = QKVParallelLinear(
        64, 16, 4, 2, bias=False, params_dtype=torch.bfloat16, parallel_group="replicated", prefix="q",
        quant_config=Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="static"),
    )  # fmt: skip
    codes = torch.randn(128, 64).to(torch.float8_e4m3fn)
    layer.weight.data.copy_(codes.view(torch.float8_e4m3fn))
    layer.weight_scale.data[:2] = torch.tensor([0.5, 0.25])
    layer.input_scale.data.copy_(torch.tensor([0.25, 1.0, 0.5]))
    compute_fp8_by_torch(torch.nn.ModuleList([layer]))
    layer.quant_method.process_weights_after_loading(layer)
    scales = torch.tensor([0.5] * 64 + [0.25] * 32 + [0.5] * 32)
    assert torch.equal(layer.weight, codes.float() * scales[:, None])
    states = torch.full((1, 64), 1.07)
    assert torch.equal(product(layer, states), torch.ones(1, 64) * 1.125 @ layer.weight.T)  # codes of 1 are 0.125 apart


def test_other_weights_can_be_loaded_into_a_layer_in_use(tiny_llama_dir, tmp_path):
    """As SGLang's weight updates do it: restored, loaded, processed; one that fails on the way is begun again."""
    source = write_fp8(tiny_llama_dir, tmp_path / "source", "fp8-block")
    stored, name = load_file(source / "model.safetensors"), "model.layers.0.mlp"
    quant_config = Fp8Config.from_config(json.loads((source / "config.json").read_text())["quantization_config"])
    states, products = torch.randn(5, 64), []
    others = {key: rows.roll(1 if key.endswith("scale_inv") else BLOCK[0], 0) for key, rows in stored.items()}
    layer, parts = layers_of(quant_config, "model.layers.0")[name]
    model, cpu = torch.nn.ModuleList([layer]), torch.device("cpu")
    for weights in (stored, others, stored):
        for _ in range(2):
            DefaultModelLoader.restore_weights_before_loading(model, cpu)
        load(layer, name, parts, weights)
        loading.compute_fp8_by_torch(model, cpu)
        DefaultModelLoader.postprocess_weights(model, cpu)
        products.append(product(layer, states))
    first, second, third = products
    assert torch.equal(first, third)
    assert torch.equal(second[:, :128], torch.roll(first[:, :128], BLOCK[0], 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("place", range(4), ids=["qkv", "o", "gate and up", "down"])
def test_weights_in_16_bits_are_quantised_while_they_are_loaded(place):
    """`--quantization fp8` of an unquantised stage: rows of weights and inputs are rounded under own scales."""
    layer, _ = list(layers_of(Fp8Config(activation_scheme="dynamic"), "model.layers.0").values())[place]
    weight = torch.randn(layer.weight.shape).bfloat16()
    states = torch.randn(5, weight.shape[1])
    layer.weight.data.copy_(weight)
    compute_fp8_by_torch(torch.nn.ModuleList([layer]))
    layer.quant_method.process_weights_after_loading(layer)

    def rounded(rows):
        scale = rows.abs().amax(1, keepdim=True) / 448
        return (rows / scale).to(torch.float8_e4m3fn).float() * scale

    torch.testing.assert_close(product(layer, states), rounded(states) @ rounded(weight.float()).T, rtol=0, atol=1e-5)
    assert (product(layer, states) - rounded(states) @ weight.float().T).abs().max() > 1e-3


def test_experts_in_fp8_are_refused():
    layer = torch.nn.Module()
    layer.w13_weight = torch.nn.Parameter(torch.zeros(2, 4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    layer.quant_method = SimpleNamespace()
    with pytest.raises(RuntimeError, match=r"experts has FP8 weights .* nothing computes on a CPU: serve this"):
        compute_fp8_by_torch(torch.nn.ModuleDict({"experts": layer}))


def test_other_devices_keep_sglangs_kernels():
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    layer.quant_method = kept = SimpleNamespace()
    loading.compute_fp8_by_torch(layer, torch.device("cuda"))
    assert layer.quant_method is kept
