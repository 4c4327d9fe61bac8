"""The library of kernels/sparse_kv_send.h, from Python: the CUDA one on GPU tensors, the host one on CPU tensors."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

KERNELS = Path(__file__).parent / "kernels"
NATIVE_DTYPES = ("float32", "float16", "bfloat16")  # places are the values of pdtrim::Dtype
KERNEL_WIRE_DTYPES = ("native", "int8", "fp8")  # and of pdtrim::Wire


class _Send(ctypes.Structure):
    """struct PdtrimSend."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k", "v", "rows", "staging")),
        ("offset", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("row_index_bytes", "kv_heads", "head_dim", "dtype", "wire")),
    )


class SendKernel:
    """pdtrim_sparse_kv_send of one shared library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.pdtrim_packed_bytes.restype = ctypes.c_int64

    def __call__(
        self,
        keys: Tensor,
        values: Tensor,
        rows: Tensor,
        staging: Tensor,
        offset: int = 0,
        wire_dtype: str = "native",
        stream: int = 0,
        reference: bool = False,
    ) -> int:
        """Pack one layer's rows into `staging` at `offset`.

        Args:
            keys, values: `[slots, kv_heads, head_dim]`, contiguous, float32, float16 or bfloat16.
            rows: int64 or int32 `[rows]`, each in `[0, slots)`; not checked.
            staging: uint8, at least `offset` + the bytes written.
            stream: cudaStream_t as a number.
            reference: use the host reference instead of the kernel (CPU tensors).

        Returns:
            Bytes written.

        Raises:
            ValueError: the tensors do not fit together, or the launch was refused (its cudaError_t is named).

        """
        _, heads, dim = keys.shape
        if values.shape != keys.shape or values.dtype != keys.dtype or rows.ndim != 1:
            raise ValueError("keys and values must be of one shape and dtype, rows a vector")
        if not all(tensor.is_contiguous() for tensor in (keys, values, rows, staging)):
            raise ValueError("keys, values, rows and staging must be contiguous")
        send = _Send(
            keys.data_ptr(),
            values.data_ptr(),
            rows.data_ptr(),
            staging.data_ptr(),
            offset,
            len(rows),
            rows.element_size(),
            heads,
            dim,
            NATIVE_DTYPES.index(str(keys.dtype).removeprefix("torch.")),
            KERNEL_WIRE_DTYPES.index(wire_dtype),
        )
        written = int(self._library.pdtrim_packed_bytes(ctypes.byref(send)))
        if offset + written > staging.numel() * staging.element_size():
            raise ValueError(f"staging is too small: {written} bytes at {offset} of {staging.numel()}")
        if reference:
            status = self._library.pdtrim_sparse_kv_send_reference(ctypes.byref(send))
        else:
            status = self._library.pdtrim_sparse_kv_send(ctypes.byref(send), ctypes.c_void_p(stream))
        if status:
            raise ValueError(f"pdtrim_sparse_kv_send refused (cudaError_t {status})")
        return written
