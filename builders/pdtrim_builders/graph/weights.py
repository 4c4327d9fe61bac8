"""Weights from safetensors to ONNX, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import onnx
import torch
from onnx import TensorProto
from safetensors import safe_open
from torch import Tensor

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.loading import TORCH_DTYPES
from pdtrim_deploy.models.tensors import TensorInfo

ONNX_DTYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_ALIGNMENT = 4096  # a page: onnxruntime then maps the file instead of reading it


class Weights:
    """Reads tensors of a stage and makes initialisers; with `data_file` their bytes go into that file."""

    def __init__(self, tensors: Mapping[str, TensorInfo], dtype: str, data_file: Path | None) -> None:
        self._tensors, self._dtype, self._data_path = tensors, dtype, data_file
        self._data: BinaryIO | None = None
        self.used: set[str] = set()
        self.initializers: list[TensorProto] = []

    def __enter__(self) -> Weights:
        if self._data_path is not None:
            self._data = self._data_path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._data is not None:
            self._data.close()

    def has(self, name: str) -> bool:
        """Whether the stage has that tensor."""
        return name in self._tensors

    def read(self, name: str) -> Tensor:
        """The stage's tensor in the graph's dtype; UserError where float16 cannot hold it."""
        info = self._tensors[name]
        self.used.add(name)
        with safe_open(info.file, framework="pt") as shard:
            tensor = shard.get_tensor(name)
        cast = tensor.to(TORCH_DTYPES[self._dtype])
        if self._dtype == "float16" and not cast.isfinite().all():
            raise UserError(f"{info.file.parent}: {name} has values that float16 cannot hold; choose dtype float32")
        return cast

    def add(self, name: str, tensor: Tensor, dtype: str | None = None) -> str:
        """Make an initialiser of int64, or of floating values cast to `dtype`, by default the graph's."""
        dtype = dtype or self._dtype
        integers = not tensor.is_floating_point()
        tensor = tensor if integers else tensor.to(TORCH_DTYPES[dtype])
        kind = TensorProto.INT64 if integers else ONNX_DTYPES[dtype]
        proto = TensorProto(name=name, data_type=kind, dims=tensor.shape)
        array = tensor.contiguous().view(torch.uint8).numpy()  # numpy has no bfloat16
        if self._data is None or tensor.nbytes < _ALIGNMENT:
            proto.raw_data = array.tobytes()
        else:
            self._data.seek(-self._data.tell() % _ALIGNMENT, 1)
            place = {"location": Path(self._data.name).name, "offset": self._data.tell(), "length": tensor.nbytes}
            proto.data_location = TensorProto.EXTERNAL
            proto.external_data.extend(
                onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in place.items()
            )
            self._data.write(array.data)
        self.initializers.append(proto)
        return name


def weight_bytes(tensors: Mapping[str, TensorInfo], dtype: str) -> int:
    """Bytes of all the stage's tensors in `dtype`."""
    return sum(info.elements for info in tensors.values()) * TORCH_DTYPES[dtype].itemsize


def as_matmul(*weights: Tensor) -> Tensor:
    """Linear weights `[out, in]`, side by side as one right operand of MatMul, `[in, sum of out]`."""
    return torch.cat(weights).T.contiguous()
