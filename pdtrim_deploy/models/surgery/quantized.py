"""What a stage's folder has of a quantised checkpoint: new codes and scales of what was changed, and its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import safe_open
from torch import Tensor

from pdtrim_deploy.models.checkpoint import Checkpoint
from pdtrim_deploy.models.quantized.arithmetic import quantize
from pdtrim_deploy.models.quantized.module_lists import cut_settings
from pdtrim_deploy.models.quantized.registry import MODELOPT_FILE, read_modelopt_file


def quantize_like(checkpoint: Checkpoint, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`changed` (tensors by the checkpoint's names), those whose weights are codes there as codes and scales."""
    quantized, tensors = checkpoint.quantized, checkpoint.tensors
    if quantized is None:
        return dict(changed)
    stored: dict[str, Tensor] = {}
    for name, tensor in changed.items():
        if not quantized.is_quantized(name, tensors):
            stored[name] = tensor
            continue
        scale = quantized.scale_of(name)
        with safe_open(tensors[scale].file, framework="pt") as shard:
            like = shard.get_tensor(scale)
        stored[name], stored[scale] = quantize(tensor, like, quantized.block, quantized.powers_of_two)
    return stored


def stage_settings(checkpoint: Checkpoint, blocks: Sequence[int]) -> dict[str, Any]:
    """Files of settings beside config.json, by name."""
    if checkpoint.quantized is None or not (checkpoint.path / MODELOPT_FILE).is_file():
        return {}
    return {MODELOPT_FILE: cut_settings(read_modelopt_file(checkpoint.path), blocks, checkpoint.tensors)}
