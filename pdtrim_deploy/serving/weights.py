"""Whether a device computes with a stage's weights, asked before a worker starts."""

from __future__ import annotations

import json
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.local.processor import cpu_features
from pdtrim_deploy.models.quantized import read_quantized

_TILES = "amx_tile"


def require_weights(stage_dir: Path, device: str) -> None:
    """UserError: FP8 weights on a CPU, where SGLang 0.5.23 has them in blocks and with Intel AMX alone."""
    if device != "cpu":
        return
    quantized = read_quantized(stage_dir, json.loads((stage_dir / "config.json").read_text()))
    if quantized is None:
        return
    if quantized.method != "fp8" or quantized.block is None or _TILES not in (cpu_features() or ()):
        raise UserError(
            f"the stages' weights are {quantized.label}, which SGLang 0.5.23 computes on GPUs, and on a CPU in the "
            "blocks of fp8 format with Intel AMX alone; serve this bundle on GPUs, or build it from unquantised weights"
        )
