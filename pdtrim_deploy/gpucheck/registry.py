"""The parts of the check, in the order in which they run: what needs least comes first, extra parts last.

The seconds of all but the extra parts fit the check's budget together. They are planned for one H100: a pair starts in
25 to 35 s, CUDA graphs included, and the kernels compile for a minute.
"""

from __future__ import annotations

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.gpucheck.base import Part

_HERE = "pdtrim_deploy.gpucheck"
_OWN = ("transformers", "pydantic", "yaml")
_SGLANG = ("sglang",)
PARTS = {
    part.name: part
    for part in (
        Part("kernels", f"{_HERE}.kernels:kernel_rows", 80, ("triton", "pydantic")),
        Part("oracle", f"{_HERE}.oracle:oracle_rows", 40, _OWN),
        Part("served", f"{_HERE}.served:attention_rows", 160, _OWN, _SGLANG),
        Part("smollm2", f"{_HERE}.served:smollm2_rows", 45, _OWN, _SGLANG),
        Part("itl", f"{_HERE}.served:itl_rows", 80, _OWN, _SGLANG),
        Part("nixl", f"{_HERE}.served:nixl_rows", 55, _OWN, (*_SGLANG, "nixl")),
        Part("mooncake", f"{_HERE}.served:mooncake_rows", 55, _OWN, (*_SGLANG, "mooncake")),
        Part("tensorrt", f"{_HERE}.served:tensorrt_rows", 55, (*_OWN, "tensorrt", "onnx"), (*_SGLANG, "tensorrt")),
        Part("fp8-pool", f"{_HERE}.served:fp8_pool_rows", 240, _OWN, _SGLANG, extra=True),
        Part("windows", f"{_HERE}.served:window_rows", 240, _OWN, _SGLANG, extra=True),
        Part("latents", f"{_HERE}.served:latent_rows", 240, _OWN, _SGLANG, extra=True),
        Part("speculation", f"{_HERE}.served:speculation_rows", 240, _OWN, _SGLANG, extra=True),
    )
}


def parts_named(names: tuple[str, ...]) -> list[Part]:
    """Those parts, all where none is named.

    Raises:
        UserError: there is no such part.

    """
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f"--part {unknown[0]}: there is no such part; valid: {', '.join(PARTS)}")
    return [part for name, part in PARTS.items() if not names or name in names]
