"""A random model whose linear weights are FP8, as two libraries write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pdtrim_deploy.models.quantized.arithmetic import quantize

_OF_ROWS = {
    "targets": ["Linear"], "output_activations": None,
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True},
}  # fmt: skip
_COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": _OF_ROWS}, "ignore": ["lm_head"], "kv_cache_scheme": None,
}  # fmt: skip
_BLOCK = (128, 128)
_BLOCKS = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(_BLOCK),
    "modules_to_not_convert": ["lm_head"],
}  # fmt: skip
FP8: dict[str, tuple[dict[str, Any], str, tuple[int, int] | None]] = {
    "compressed-tensors, a scale a row": (_COMPRESSED, "weight_scale", None),
    "fp8, a scale a block": (_BLOCKS, "weight_scale_inv", _BLOCK),
}
"""FP8 weights by name: the settings in config.json, the name of the scales, and the block that shares one."""


def to_fp8(folder: Path, kind: str) -> None:
    """Replace the linear weights of a saved model by codes and scales, in a format of FP8."""
    section, scale_name, block = FP8[kind]
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.dim() != 2 or ".layers." not in name:
            stored[name] = weight
            continue
        sides = block or (1, weight.shape[1])
        like = torch.empty([-(-size // side) for size, side in zip(weight.shape, sides, strict=True)])
        codes = quantize(weight, like, block, powers_of_two=False)
        stored[name], stored[f"{name.removesuffix('weight')}{scale_name}"] = codes
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
