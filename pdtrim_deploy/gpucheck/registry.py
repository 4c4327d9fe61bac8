"""The parts of the check, in the order in which they run: what needs least comes first."""

from __future__ import annotations

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.gpucheck.base import Part

_HERE = "pdtrim_deploy.gpucheck"
_OWN = ("transformers", "pydantic", "yaml")
PARTS = {
    part.name: part
    for part in (
        Part("kernels", f"{_HERE}.kernels:kernel_rows", 120, ("triton", "pydantic")),
        Part("oracle", f"{_HERE}.oracle:oracle_rows", 150, _OWN),
        Part("served", f"{_HERE}.served:attention_rows", 300, _OWN, ("sglang",)),
        Part("fp8-pool", f"{_HERE}.served:fp8_pool_rows", 240, _OWN, ("sglang",)),
        Part("windows", f"{_HERE}.served:window_rows", 240, _OWN, ("sglang",)),
        Part("latents", f"{_HERE}.served:latent_rows", 240, _OWN, ("sglang",)),
        Part("speculation", f"{_HERE}.served:speculation_rows", 240, _OWN, ("sglang",)),
        Part("smollm2", f"{_HERE}.served:smollm2_rows", 180, _OWN, ("sglang",)),
        Part("itl", f"{_HERE}.served:itl_rows", 180, _OWN, ("sglang",)),
        Part("nixl", f"{_HERE}.served:nixl_rows", 120, _OWN, ("sglang", "nixl")),
        Part("mooncake", f"{_HERE}.served:mooncake_rows", 120, _OWN, ("sglang", "mooncake")),
        Part("tensorrt", f"{_HERE}.served:tensorrt_rows", 240, (*_OWN, "tensorrt", "onnx"), ("sglang", "tensorrt")),
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
