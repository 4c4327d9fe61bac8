"""Linear attention that SGLang 0.5.23 has no kernel for."""

from __future__ import annotations

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.plan import ModelShape


def require_linear_attention(model: ModelShape, dtype: str, device: str = "cuda") -> None:
    """UserError: linear attention of `model` that SGLang has no kernel for, on `device` in the workers' `dtype`.

    Prefill's Triton kernel asserts that it is not given float32 (kernels/ops/attention/fla/chunk.py).
    """
    if model.states is None:
        return
    if device == "cpu":
        raise UserError(
            f"{model.architecture} has linear attention, which SGLang 0.5.23 computes on a CPU with "
            "kernels of its own (sgl_kernel) that are not published; serve this bundle on GPUs, eval judges it here"
        )
    if dtype == "float32":
        raise UserError(
            f"{model.architecture} has linear attention, which SGLang 0.5.23 does not compute in float32 on a GPU: "
            "build with model.dtype bfloat16 or float16"
        )
