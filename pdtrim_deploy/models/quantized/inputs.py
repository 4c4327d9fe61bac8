"""What a layer with FP8 weights multiplies them with on a GPU: its input, rounded to FP8 as SGLang rounds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pdtrim_deploy.models.quantized.arithmetic import LARGEST
from pdtrim_deploy.models.quantized.base import INPUT_SCALE, Quantized
from pdtrim_deploy.models.tensors import TensorInfo

_SMALLEST = 1e-10  # of a scale that is measured, as SGLang's kernels have it


def round_inputs(model: Any, quantized: Quantized, tensors: Mapping[str, TensorInfo]) -> None:
    """From now on layers of `model` whose weights are codes in `tensors` round their inputs.

    Experts, which transformers stacks, are left as they are.
    """
    modules = dict(model.named_modules())
    for name in tensors:
        layer = modules.get(name.removesuffix(".weight"))
        if layer is None or not quantized.is_quantized(name, tensors):
            continue
        how = _rounding(quantized, name, tensors)
        if how is not None:
            layer.register_forward_pre_hook(partial(_rounded, how))


def _rounded(how: Callable[[Tensor], Tensor], _: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (how(inputs[0]), *inputs[1:])


def _rounding(quantized: Quantized, name: str, tensors: Mapping[str, TensorInfo]) -> Callable[[Tensor], Tensor] | None:
    if quantized.inputs == "stored":
        place = f"{name.removesuffix('weight')}{INPUT_SCALE}"
        if place not in tensors:
            return None
        with safe_open(tensors[place].file, framework="pt") as shard:
            scale = shard.get_tensor(place).float().amax()
        return partial(_to_fp8, scale=scale)
    if quantized.inputs == "token":
        return by_token
    if quantized.inputs == "group":
        assert quantized.block is not None
        return partial(by_group, size=quantized.block[1])
    return None


def by_token(states: Tensor) -> Tensor:
    """`[..., hidden]`, each row under a scale of its own."""
    return _to_fp8(states, states.float().abs().amax(-1, keepdim=True) / LARGEST)


def by_group(states: Tensor, size: int) -> Tensor:
    """`[..., hidden]`, every `size` values of a row under a scale of their own."""
    hidden = states.shape[-1]
    groups = torch.nn.functional.pad(states, (0, -hidden % size)).unflatten(-1, (-1, size))
    return by_token(groups).flatten(-2)[..., :hidden]


def _to_fp8(states: Tensor, scale: Tensor) -> Tensor:
    scale = scale.clamp_min(_SMALLEST)
    codes = (states.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(states.dtype)
