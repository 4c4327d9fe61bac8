"""FP8 checkpoints of a tiny model, as the libraries write them: codes, scales and settings, by format."""

import json
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = (32, 16)  # two sizes, so that one in the place of the other is seen; SGLang serves square ones on a CPU
SQUARE = (16, 16)
IGNORED = "model.layers.2.mlp.down_proj"  # stays as it is, beside lm_head
LARGEST = 448.0


def _tensor(weight):
    return weight.abs().amax() / LARGEST, None


def _channel(weight):
    return weight.abs().amax(1, keepdim=True) / LARGEST, None


def _blocks(weight, block):
    """A scale of each block, and the same as it multiplies each weight, by loops."""
    rows, columns = (-(-size // side) for size, side in zip(weight.shape, block, strict=True))
    scales, spread = torch.zeros(rows, columns), torch.zeros_like(weight)
    for row in range(rows):
        for column in range(columns):
            part = (
                slice(row * block[0], (row + 1) * block[0]),
                slice(column * block[1], (column + 1) * block[1]),
            )
            scales[row, column] = weight[part].abs().amax() / LARGEST
            spread[part] = scales[row, column]
    return scales, spread


def _group(strategy, **more):
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False, **more}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    if strategy == "block":
        inputs |= {"strategy": "group", "group_size": more["block_structure"][1]}
    return {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}


def _compressed(strategy, **more):
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": _group(strategy, **more)}, "ignore": ["lm_head", IGNORED],
        "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip


_MODELOPT = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
_STATIC = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head", IGNORED]}


def _kinds(block):
    """By name: scales of a weight, their name and dtype, settings of config.json, and of hf_quant_config.json."""
    blocks = partial(_blocks, block=block)
    dynamic = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(block)}
    return {
        "compressed-tensor": (_tensor, "weight_scale", torch.float32, _compressed("tensor"), None),
        "compressed-channel": (_channel, "weight_scale", torch.bfloat16, _compressed("channel"), None),
        "compressed-block": (
            blocks, "weight_scale", torch.float32, _compressed("block", block_structure=list(block)), None,
        ),
        "modelopt": (
            _tensor, "weight_scale", torch.float32,
            {"quant_method": "modelopt", **_MODELOPT, "ignore": ["lm_head", "model.layers.2.mlp.d*"]}, None,
        ),
        "modelopt-file": (
            _tensor, "weight_scale", torch.float32, None,
            {"producer": {"name": "modelopt"},
             "quantization": {**_MODELOPT, "exclude_modules": ["lm_head", "model.layers.2.mlp.d*"]}},
        ),
        "fp8-tensor": (_tensor, "weight_scale", torch.float32, _STATIC, None),
        "fp8-block": (
            blocks, "weight_scale_inv", torch.float32,
            {**dynamic, "modules_to_not_convert": ["lm_head", IGNORED]}, None,
        ),
    }  # fmt: skip


KINDS = tuple(_kinds(BLOCK))


def write_fp8(
    source: Path, folder: Path, kind: str, dtype: torch.dtype = torch.float32, block: tuple[int, int] = BLOCK
) -> Path:
    """`source` quantised into `folder`; and beside it `folder`-float, what its codes and scales stand for."""
    scales, scale_name, scale_dtype, section, file = _kinds(block)[kind]
    shutil.copytree(source, folder)
    stored, plain = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        linear = weight.dim() == 2 and "layers." in name and module != IGNORED and not module.endswith("mlp.gate")
        if not linear:
            stored[name] = plain[name] = weight.to(dtype)
            continue
        scale, spread = scales(weight.float())
        scale = scale.to(scale_dtype)
        spread = scale.float() if spread is None else spread
        codes = (weight / spread).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        stored[name], stored[f"{module}.{scale_name}"] = codes, scale
        plain[name] = (codes.float() * spread).to(dtype)
        if kind.startswith("modelopt") or kind == "fp8-tensor":
            stored[f"{module}.input_scale"] = torch.tensor(0.25)
        if kind.startswith("modelopt") and module.endswith(("k_proj", "v_proj")):
            stored[f"{module}.{module[-6]}_scale"] = torch.tensor(0.5)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    floats = folder.with_name(f"{folder.name}-float")
    shutil.copytree(source, floats)
    (floats / "config.json").write_text(json.dumps(config))
    save_file(plain, floats / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": section} if section else {})))
    if file is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(file))
    return folder
