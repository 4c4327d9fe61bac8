"""The parts of the check, in the order in which they run: what needs least comes first, extra parts last.

The seconds of all but the extra parts fit the check's budget together. They are planned for one H100: a pair starts in
25 to 35 s, CUDA graphs included, and the kernels compile for a minute.
"""

from __future__ import annotations

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.gpucheck.base import Part

_HERE = "pdtrim_deploy.gpucheck"
_CORE = ("transformers", "pydantic", "yaml")
_SGLANG = ("sglang",)
_PLUGIN = "pdtrim_tensorrt"
PARTS = {
    part.name: part
    for part in (
        Part("kernels", f"{_HERE}.kernels:kernel_checks", 80, ("triton",)),
        Part("oracle", f"{_HERE}.oracle:oracle_checks", 40, _CORE),
        Part("served", f"{_HERE}.attention:attention_checks", 160, _CORE, _SGLANG),
        Part("smollm2", f"{_HERE}.plans:smollm2_checks", 45, _CORE, _SGLANG),
        Part("itl", f"{_HERE}.timed:itl_checks", 80, _CORE, _SGLANG),
        Part("nixl", f"{_HERE}.timed:nixl_checks", 60, _CORE, (*_SGLANG, "nixl")),
        Part("mooncake", f"{_HERE}.timed:mooncake_checks", 60, _CORE, (*_SGLANG, "mooncake")),
        Part(
            "tensorrt",
            f"{_PLUGIN}.engine_check:tensorrt_checks",
            50,
            (*_CORE, "tensorrt", "onnx"),
            (*_SGLANG, "tensorrt"),
        ),
        Part("cuda-pack", f"{_PLUGIN}.gpu_check:cuda_pack_checks", 90, extra=True),
        Part("workers", f"{_HERE}.options:worker_checks", 140, _CORE, _SGLANG, extra=True),
        Part("build", f"{_HERE}.builds:build_checks", 60, _CORE, extra=True),
        Part("no-graphs", f"{_HERE}.attention:no_graphs_checks", 160, _CORE, _SGLANG, extra=True),
        Part("plans", f"{_HERE}.plans:plan_checks", 285, _CORE, _SGLANG, extra=True),
        Part("ranks", f"{_HERE}.options:rank_checks", 160, _CORE, _SGLANG, extra=True),
        Part("fp8-pool", f"{_HERE}.pools:fp8_pool_checks", 200, _CORE, _SGLANG, extra=True),
        Part("fp8-weights", f"{_HERE}.plans:fp8_weight_checks", 80, _CORE, _SGLANG, extra=True),
        Part("windows", f"{_HERE}.pools:window_checks", 120, _CORE, _SGLANG, extra=True),
        Part("latents", f"{_HERE}.pools:latent_checks", 160, _CORE, _SGLANG, extra=True),
        Part("states", f"{_HERE}.pools:state_checks", 160, _CORE, _SGLANG, extra=True),
        Part("speculation", f"{_HERE}.options:speculation_checks", 80, _CORE, _SGLANG, extra=True),
        Part("cache", f"{_HERE}.options:cache_checks", 200, _CORE, _SGLANG, extra=True),
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
