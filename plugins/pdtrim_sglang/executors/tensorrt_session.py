"""`Session` on the `tensorrt` module (10 and 11), and tensors over device memory. Never run: it needs a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pdtrim_sglang.executors.session import View

_NAMES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT64": torch.int64,
}
# The CUDA array interface has no bfloat16: those are handed over as integers of the same width.
_TYPESTR = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<i2", torch.int8: "|i1", torch.int64: "<i8"}


class TensorRTSession:
    """An execution context of an engine, profile 0.

    `scratch` is uint8 device memory of at least `engine.device_memory_size_v2` bytes, which contexts share.
    """

    def __init__(self, trt: Any, engine: Any, scratch: Tensor, owners: tuple[Any, ...]) -> None:
        self._trt, self._engine, self._scratch = trt, engine, scratch
        self._owners = owners  # TensorRT asks that the runtime and its logger live as long as the engine
        self._context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._context.set_device_memory(scratch.data_ptr(), len(scratch))
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        fed = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.inputs: Mapping[str, int] = {name: engine.get_tensor_profile_shape(name, 0)[2][0] for name in fed}
        self.outputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = {
            name: (tuple(engine.get_tensor_shape(name)), _dtype(engine.get_tensor_dtype(name)))
            for name in names
            if name not in fed
        }

    @classmethod
    def load(cls, trt: Any, plan: Path, library: Path) -> TensorRTSession:
        """Register the library's plugins, then read the plan.

        Raises:
            RuntimeError: TensorRT refuses one of them; its own log says why.

        """
        logger = trt.Logger(trt.Logger.WARNING)
        trt.init_libnvinfer_plugins(logger, "")
        if trt.get_plugin_registry().load_library(str(library)) is None:
            raise RuntimeError(f"pdtrim: TensorRT {trt.__version__} cannot load {library}; build it for this version")
        runtime = trt.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            raise RuntimeError(f"pdtrim: TensorRT {trt.__version__} cannot load {plan}; build it on this machine")
        size = max(1, engine.device_memory_size_v2)
        scratch = torch.empty(size, dtype=torch.uint8, device="cuda")  # torch aligns it to 512 bytes
        return cls(trt, engine, scratch, (runtime, logger))

    def another(self) -> TensorRTSession:
        return TensorRTSession(self._trt, self._engine, self._scratch, self._owners)

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise RuntimeError(f"pdtrim: TensorRT refuses shape {shape} of {name}")

    def set_address(self, name: str, pointer: int) -> None:
        if not self._context.set_tensor_address(name, pointer):
            raise RuntimeError(f"pdtrim: TensorRT refuses the memory of {name}")

    def enqueue(self, stream: int) -> bool:
        return bool(self._context.execute_async_v3(stream))


def device_view(device: torch.device) -> View:
    """Tensors over memory of `device` that somebody else owns."""

    def view(pointer: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not all(shape):
            return torch.empty(shape, dtype=dtype, device=device)
        described = {
            "data": (pointer, False),
            "shape": shape,
            "typestr": _TYPESTR[dtype],
            "version": 3,
        }
        tensor = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=described), device=device)
        return tensor.view(dtype)

    return view


def _dtype(dtype: Any) -> torch.dtype:
    name = str(dtype).rsplit(".", 1)[-1]
    if name not in _NAMES:
        raise RuntimeError(f"pdtrim: the engine has a tensor of {name}; use an engine of pdtrim-deploy build")
    return _NAMES[name]
