"""Layers with FP8 weights on a CPU, by torch: SGLang 0.5.23 has kernels for some formats, with Intel AMX alone.

SGLang makes the parameters of such a layer and loads codes and scales into them. Then the weight becomes what they
stand for, in float32, and each input is rounded to FP8 under a scale, as SGLang's kernels for GPUs round it. Experts
are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = torch.finfo(torch.float8_e4m3fn).max
SMALLEST = 1e-10  # of a scale that is measured, as SGLang's kernels have it


@dataclass(frozen=True)
class TorchFp8Linear:
    """A quant method of SGLang (`LinearMethodBase`) for a layer whose parameters another one has made.

    Attributes:
        block: rows and columns of the weight that share a scale; None: a shard, or a row does.
        rounds: whether inputs are rounded.
        quantises: whether weights are read in 16 bits and rounded here, each row under a scale, as SGLang does on GPUs.
        loads: the method that has made the parameters, which SGLang's loaders ask how to fill them.

    """

    block: tuple[int, int] | None
    rounds: bool
    quantises: bool = False
    loads: Any = None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make `layer.weight` float32 `[out, in]`, and put what was loaded aside."""
        layer.pdtrim_loaded = {"weight": layer.weight}
        weight = layer.weight.data.float()
        if self.quantises:
            weight = by_row(weight)
        else:
            name = "weight_scale_inv" if hasattr(layer, "weight_scale_inv") else "weight_scale"
            layer.pdtrim_loaded[name] = getattr(layer, name)
            weight *= _spread(getattr(layer, name).data.float(), weight.shape, layer.logical_widths, self.block)
            delattr(layer, name)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.pdtrim_round = self._rounding(getattr(layer, "input_scale", None))

    def restore_weights_before_loading(self, layer: Any) -> None:
        """Give the layer back what SGLang's loaders fill when weights are updated."""
        for name, parameter in vars(layer).pop("pdtrim_loaded", {}).items():
            setattr(layer, name, parameter)
        layer.quant_method = self.loads

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., out]` in the dtype of `x` `[..., in]`."""
        product = nn.functional.linear(layer.pdtrim_round(x.float()), layer.weight)
        return (product if bias is None else product + bias).to(x.dtype)

    def _rounding(self, stored: Tensor | None) -> Callable[[Tensor], Tensor]:
        if not self.rounds:
            return lambda states: states
        if stored is not None:  # one for each of the maps that SGLang has fused, of which its kernels take the largest
            return partial(_to_fp8, scale=stored.data.max())
        return by_row if self.block is None else partial(_by_group, size=self.block[1])


def compute_fp8_by_torch(model: Any) -> None:
    """Give the layers of a model, which SGLang has loaded and not yet processed, a method that needs no kernel.

    Raises:
        RuntimeError: it has experts in FP8, or weights quantised otherwise, which nothing computes on a CPU.

    """
    from sglang.srt.layers.quantization.base_config import QuantizeMethodBase

    QuantizeMethodBase.register(TorchFp8Linear)  # SGLang restores weights of its own methods alone
    for name, module in model.named_modules():
        if isinstance(getattr(module, "quant_method", None), TorchFp8Linear):  # its weights are updated
            continue
        method = _method(module)
        if method is None and not _has_fp8(module):
            continue
        if method is None:
            raise RuntimeError(
                f"pdtrim: {name} has FP8 weights by {type(module.quant_method).__name__}, which nothing computes on a "
                "CPU: serve this bundle on GPUs"
            )
        module.quant_method = replace(method, loads=module.quant_method)


def _has_fp8(layer: Any) -> bool:
    """Whether weights are in FP8, or experts' weights are to be."""
    from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod

    codes = any(part.dtype == torch.float8_e4m3fn for part in layer.parameters(recurse=False))
    return codes or isinstance(getattr(layer, "quant_method", None), Fp8MoEMethod)


def _method(layer: Any) -> TorchFp8Linear | None:
    """By what SGLang has given the layer."""
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        CompressedTensorsW8A8Fp8,
        CompressedTensorsW8A16Fp8,
    )
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp8LinearMethod

    method = getattr(layer, "scheme", None) or getattr(layer, "quant_method", None)
    if isinstance(method, CompressedTensorsW8A16Fp8):
        return TorchFp8Linear(None, rounds=False)
    if isinstance(method, (Fp8LinearMethod, CompressedTensorsW8A8Fp8)):
        block = method.weight_block_size
        quantises = not getattr(method, "is_checkpoint_fp8_serialized", True)
        return TorchFp8Linear(None if block is None else (block[0], block[1]), rounds=True, quantises=quantises)
    return TorchFp8Linear(None, rounds=True) if isinstance(method, ModelOptFp8LinearMethod) else None


def _spread(scales: Tensor, shape: torch.Size, shards: list[int], block: tuple[int, int] | None) -> Tensor:
    """Scales as they multiply a weight `[out, in]` of `shape`, whose rows are `shards` behind each other."""
    if block is not None:
        rows = scales.repeat_interleave(block[0], 0)[: shape[0]]
        return rows.repeat_interleave(block[1], 1)[:, : shape[1]]
    if scales.numel() == shape[0]:
        return scales.reshape(-1, 1)
    # shards that are one tensor in the checkpoint have its scale at the first place alone
    filled = torch.where(scales >= 0, scales, scales[0])
    return filled.repeat_interleave(torch.tensor(shards)).reshape(-1, 1)


def by_row(states: Tensor) -> Tensor:
    """float32 `[..., in]` to FP8 and back, each row under the scale that gives its largest value the largest code."""
    return _to_fp8(states, states.abs().amax(-1, keepdim=True) / LARGEST)


def _by_group(states: Tensor, size: int) -> Tensor:
    groups = nn.functional.pad(states, (0, -states.shape[-1] % size)).unflatten(-1, (-1, size))
    return by_row(groups).flatten(-2)[..., : states.shape[-1]]


def _to_fp8(states: Tensor, scale: Tensor) -> Tensor:
    scale = scale.clamp_min(SMALLEST)
    return (states / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale
