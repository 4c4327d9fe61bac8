"""Run a stage graph in onnxruntime on the CPU, with attention in a Python callback. Imports no builder.

SGLang's executor loads this: it needs numpy, torch, onnxruntime and onnxruntime_extensions (0.15.2), not onnx.
Inputs and outputs are bound to torch memory; the callback gets torch tensors and gives one back.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from pdtrim_deploy.errors import UserError

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q `[T, heads * head_dim]`, k, v `[T, kv_heads * head_dim]`) -> `[T, heads * head_dim]`, contiguous or not.

In a KV-only layer: hidden states in place of q, which are returned unchanged.
"""

_ATTRIBUTES = ("layer_id", "num_kv_heads", "head_dim")
_TORCH = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64}


@dataclass(frozen=True)
class StageOutput:
    """`hidden` `[T, hidden]` after the final norm; `packed` by output name, `[2, R, kv_heads * head_dim]` each."""

    hidden: Tensor
    packed: dict[str, Tensor]


class OnnxStage:
    """One stage graph in a session of its own.

    Args:
        path: the graph that target `onnx` wrote.
        attention: computes `PagedAttention` and `KVWrite`, in the thread that called `run`; without it their bodies
            run: causal attention among the tokens of one prompt.
        threads: onnxruntime's intra-op threads.
        shared: weights by name that the caller holds anyway (`embed_tokens`), used in place and not loaded again.
        mapped: weights stay in the pages of the graph's own file, at their place: no copies of them are packed, or cast
            once for all. For a graph that is checked, not served: it is slower.
        profile: prefix of the file where onnxruntime writes the times of every node; `node_times` ends and reads it.

    Raises:
        UserError: onnxruntime cannot load the graph.

    """

    def __init__(
        self,
        path: Path,
        attention: Attention | None = None,
        threads: int = 1,
        shared: Mapping[str, Tensor] | None = None,
        profile: Path | None = None,
        mapped: bool = False,
    ) -> None:
        options = onnxruntime.SessionOptions()
        if mapped:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.enable_cpu_mem_arena = False
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self._shared = {  # references: onnxruntime reads this memory without owning it
            name: (tensor, onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy()))
            for name, tensor in (shared or {}).items()
        }
        for name, (_, value) in self._shared.items():
            options.add_initializer(name, value)
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        # Spinning threads would starve the torch threads of the callback on the same cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0" if attention else "1")
        if attention is not None:
            options.register_custom_ops_library(_callback_library())
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no public base class
            if attention is not None and "tensor(float16)" in str(error):
                raise UserError(
                    f"{path}: a Python callback works on float32 only; build it with dtype float32"
                ) from None
            raise UserError(f"{path}: onnxruntime cannot load this graph ({str(error).splitlines()[0]})") from error
        self._attention = attention
        self._outputs = {out.name: (out.shape, _TORCH[out.type]) for out in self._session.get_outputs()}
        self._hidden_size = int(self._outputs["hidden_states"][0][1])
        self.row_inputs = tuple(i.name for i in self._session.get_inputs() if i.name.startswith("send_rows_"))
        self.packed_outputs = tuple(name for name in self._outputs if name != "hidden_states")
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.dtype = self._outputs["hidden_states"][1]

    def run(
        self,
        input_ids: Tensor,
        positions: Tensor,
        rows: Mapping[str, Tensor] | None = None,
        packed: Mapping[str, Tensor] | None = None,
    ) -> StageOutput:
        """One forward pass; raises what the callback raises.

        Args:
            input_ids, positions: int64 `[T]` on the CPU.
            rows: int64 `[R]` for each of `row_inputs`; missing ones send nothing.
            packed: contiguous buffers for outputs, written in place (the staging buffer); allocated if missing.

        """
        binding, bound = self._session.io_binding(), []
        feeds = {"input_ids": input_ids, "positions": positions}
        none = torch.empty(0, dtype=torch.int64)
        feeds |= {name: (rows or {}).get(name, none) for name in self.row_inputs}
        for name, tensor in feeds.items():
            bound.append(tensor := tensor.to(torch.int64).contiguous())
            binding.bind_input(name, "cpu", 0, np.int64, list(tensor.shape), _pointer(tensor))
        hidden = torch.empty(len(input_ids), self._hidden_size, dtype=self.dtype)
        results = {name: self._buffer(name, packed or {}, feeds) for name in self.packed_outputs}
        for name, tensor in {"hidden_states": hidden, **results}.items():
            if not tensor.is_contiguous():
                raise ValueError(f"the buffer of {name} is not contiguous")
            binding.bind_output(name, "cpu", 0, _NUMPY[tensor.dtype], list(tensor.shape), _pointer(tensor))
        with _Answering(self._attention) as call:
            try:
                self._session.run_with_iobinding(binding)
            except Exception as error:
                raise (call.error or error) from None
        if call.error:
            raise call.error
        return StageOutput(hidden, results)

    def node_times(self) -> dict[str, list[float]]:
        """Seconds of each node run so far by op type, of a session with `profile`; no more are taken."""
        times: dict[str, list[float]] = {}
        for event in json.loads(Path(self._session.end_profiling()).read_text()):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                times.setdefault(event["args"]["op_name"], []).append(event["dur"] / 1e6)
        return times

    def _buffer(self, name: str, buffers: Mapping[str, Tensor], feeds: Mapping[str, Tensor]) -> Tensor:
        shape, dtype = self._outputs[name]
        expected = (2, len(feeds[f"send_{shape[1]}"]), int(shape[2]))
        buffer = buffers.get(name)
        if buffer is None:
            return torch.empty(expected, dtype=dtype)
        if buffer.dtype != dtype or buffer.numel() != np.prod(expected):
            raise ValueError(f"the buffer of {name} is {buffer.dtype} {tuple(buffer.shape)}, not {dtype} {expected}")
        return buffer.view(expected)


def _pointer(tensor: Tensor) -> int:
    return tensor.data_ptr() or _NOWHERE.data_ptr()  # an empty tensor has no address, which a binding must have


_NOWHERE = torch.empty(1)


class _Call(threading.local):
    """The `run` that a thread is in: ops are registered once per process, callbacks belong to a session."""

    attention: Attention | None = None
    error: BaseException | None = None


_CALL = _Call()


class _Answering:
    """Answer this thread's nodes with `attention` until the block ends."""

    def __init__(self, attention: Attention | None) -> None:
        self.attention = attention
        self.error: BaseException | None = None

    def __enter__(self) -> _Answering:
        self._outer = (_CALL.attention, _CALL.error)
        _CALL.attention, _CALL.error = self.attention, None
        return self

    def __exit__(self, *_: object) -> None:
        self.error = _CALL.error
        _CALL.attention, _CALL.error = self._outer


def _answer(feed: Sequence[np.ndarray], attributes: Mapping[str, Any]) -> np.ndarray:
    """Kernel of both ops. An exception cannot cross onnxruntime: `_CALL` stores it, and other nodes get zeros."""
    q = feed[0]
    if _CALL.error is None:
        try:
            assert _CALL.attention is not None, "an op of ours ran outside OnnxStage.run"
            out = _CALL.attention(int(attributes["layer_id"]), *(torch.from_numpy(part) for part in feed))
            return out.reshape(q.shape).numpy()
        except BaseException as error:
            _CALL.error = error
    return np.zeros_like(q)


@cache
def _callback_library() -> str:
    """Register `pdtrim::PagedAttention` and `KVWrite` as Python ops, once a process; the library sessions must load.

    onnxruntime_extensions' own hook turns every result into a Python list (75 ms for 256 x 576 values); its C++ side
    takes a numpy array as well (0.1 ms), so our ops use our own hook and all others theirs.
    """
    try:
        from onnxruntime_extensions import PyCustomOpDef, _ocos, get_library_path, onnx_op
    except ImportError as error:
        raise UserError(f"executor onnxruntime needs onnxruntime_extensions ({error}); run: make setup") from None
    d = PyCustomOpDef
    attrs, more = dict.fromkeys(_ATTRIBUTES, d.dt_int64), {"num_heads": d.dt_int64, "scale": d.dt_float}
    tensors: dict[str, Any] = {"inputs": [d.dt_float] * 3, "outputs": [d.dt_float]}
    ours = {
        onnx_op(op_type=f"pdtrim::{op}", attrs=attributes, **tensors)(_answer)._id
        for op, attributes in (("PagedAttention", attrs | more), ("KVWrite", attrs))
    }

    def hook(number: int, feed: Sequence[np.ndarray], attributes: Mapping[str, Any]) -> tuple:
        if number not in ours:
            return _ocos._on_pyop_invocation(number, feed, attributes)
        out = _answer(feed, attributes)
        return number, out.shape, out.ravel()

    d.install_hooker(hook)
    return get_library_path()
