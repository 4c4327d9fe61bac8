"""Weights of a folder in memory, whatever they are stored as."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.quantized.arithmetic import dequantize
from pdtrim_deploy.models.quantized.base import Quantized
from pdtrim_deploy.models.tensors import TensorInfo


def read_weights(
    tensors: Mapping[str, TensorInfo],
    names: Iterable[str],
    dtype: torch.dtype,
    *,
    quantized: Quantized | None = None,
    keeps_dtype: Callable[[str], bool] = lambda _: False,
) -> dict[str, Tensor]:
    """Copies of the tensors `names`, cast to `dtype` but for those whose name `keeps_dtype`.

    Of `quantized` weights, what codes and scales stand for; UserError where a scale is not finite.
    """
    weights: dict[str, Tensor] = {}
    with ExitStack() as stack:
        shards: dict[Path, Any] = {}

        def stored(name: str) -> Tensor:
            file = tensors[name].file
            if file not in shards:
                shards[file] = stack.enter_context(safe_open(file, framework="pt"))
            tensor: Tensor = shards[file].get_tensor(name)
            return tensor

        for name in names:
            tensor = stored(name)
            if quantized is not None and quantized.is_quantized(name, tensors):
                scale = stored(quantized.scale_of(name))
                if not scale.float().isfinite().all():
                    raise UserError(
                        f"{tensors[name].file}: {quantized.scale_of(name)} has infinite scales, or such as are no "
                        "numbers; get the model again"
                    )
                weights[name] = dequantize(tensor, scale, quantized.block).to(dtype)
            else:
                weights[name] = tensor.clone() if keeps_dtype(name) else tensor.to(dtype, copy=True)
    return weights
