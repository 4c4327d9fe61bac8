"""libpdtrim_tensorrt.so (library/): build it with CMake, and set the attention that its PagedAttention calls.

Never run on a GPU: the callback has only been called on the host, with made-up pointers.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_tensorrt.kernel import NATIVE_DTYPES

SOURCES = Path(__file__).parent / "library"


def build_library(tensorrt_root: Path, folder: Path, on_host: bool = False, architectures: str | None = None) -> Path:
    """Build the library in `folder`.

    Args:
        tensorrt_root: its include/ has NvInfer.h.
        architectures: of GPUs, as CMake names them; `native`: of this machine's. sm_80, 90, 100 and 120 if None.
        on_host: with the kernel compiled for the CPU, to drive the plugins in a test.

    Raises:
        UserError: cmake or the CUDA toolkit is missing, or the compiler refused; the end of its output is quoted.

    """
    if not shutil.which("cmake"):
        raise UserError("building the TensorRT plugin library needs cmake and nvcc on PATH")
    configure = ["cmake", "-S", str(SOURCES), "-B", str(folder), f"-DTENSORRT_ROOT={tensorrt_root.absolute()}"]
    if architectures is not None:
        configure.append(f"-DPDTRIM_ARCHITECTURES={architectures}")
    for command in ([*configure, f"-DPDTRIM_ON_HOST={'ON' if on_host else 'OFF'}"], ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"building the TensorRT plugin library failed: {(done.stdout + done.stderr).strip()[-1500:]}"
            )
    return folder / "libpdtrim_tensorrt.so"


class _Call(ctypes.Structure):
    """struct PdtrimAttentionCall."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "output", "stream")),
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("layer_id", "width", "num_heads", "num_kv_heads", "head_dim", "dtype")),
        ("scale", ctypes.c_float),
    )


_CALL_FIELDS = [field[0] for field in _Call._fields_]
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(_Call))


@dataclass(frozen=True)
class AttentionCall:
    """An engine's request for one layer's attention: device pointers as numbers, contiguous tensors.

    Without heads it is a KV-only layer: store K and V, and copy q, which has the hidden states, to output.

    Attributes:
        q, output: `[tokens, width]`; width is num_heads * head_dim if there are heads.
        k, v: `[tokens, num_kv_heads * head_dim]`.
        stream: cudaStream_t; everything must be enqueued on it.
        dtype: of all four: float32, float16 or bfloat16.

    """

    q: int
    k: int
    v: int
    output: int
    stream: int
    tokens: int
    layer_id: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    scale: float


class PluginLibrary:
    """The loaded library. Engines of this process call the last callback given to `set_attention`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._callback: ctypes._FuncPointer | None = None
        self.error: BaseException | None = None

    def set_attention(self, attend: Callable[[AttentionCall], None]) -> None:
        """Use `attend` from now on. If it raises, the engine's enqueue fails and `self.error` has the exception."""

        def called(_: int | None, call: ctypes._Pointer[_Call]) -> int:
            values = {name: getattr(call.contents, name) for name in _CALL_FIELDS}
            pointers = {name: values[name] or 0 for name in ("q", "k", "v", "output", "stream")}  # ctypes: NULL is None
            try:
                attend(AttentionCall(**values | pointers | {"dtype": NATIVE_DTYPES[values["dtype"]]}))
            except BaseException as error:
                self.error = error  # an exception cannot cross the engine's C++
                return 1
            return 0

        callback = _Callback(called)
        self._library.pdtrim_set_attention(callback, None)
        self._callback = callback  # the library calls it for as long as it is set

    def clear_attention(self) -> None:
        """Remove the callback; a running engine then fails with a reason."""
        self._library.pdtrim_set_attention(_Callback(), None)
        self._callback = None
