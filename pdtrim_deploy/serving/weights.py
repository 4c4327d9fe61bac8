"""Whether a device computes with a stage's weights, asked before a worker starts."""

from __future__ import annotations

import json
from pathlib import Path

from pdtrim_deploy.errors import UserError
from pdtrim_deploy.models.quantized import read_quantized
from pdtrim_deploy.models.weights import ModelSizes


def require_weights(stage_dir: Path, device: str) -> None:
    """UserError: experts with FP8 weights on a CPU, where the plugin computes all other layers by torch."""
    if device != "cpu":
        return
    config = json.loads((stage_dir / "config.json").read_text())
    quantized = read_quantized(stage_dir, config)
    if quantized is not None and ModelSizes.of(config).has_experts:
        raise UserError(
            f"the stages' weights are {quantized.label}, and experts have them on GPUs alone; serve this bundle on "
            "GPUs, or build it from unquantised weights"
        )
